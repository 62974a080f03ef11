"""No network: PEFT asks the Hub about base models unless it is told not to."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
