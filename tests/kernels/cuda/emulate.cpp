// What the library says of itself where it is emulated, and the order of threads for the tests to set.
#include "emulate.hpp"

extern "C" {

int loraspan_cuda_emulated() { return 1; }

int loraspan_cuda_devices(int* count) {
  *count = 0;
  return 100;  // cudaErrorNoDevice
}

const char* loraspan_cuda_error(int code) { return code == 719 ? "threads wait for others that never come" : "error"; }

void loraspan_cuda_emulation_order(int order) { loraspan::emulation::order = order; }
}
