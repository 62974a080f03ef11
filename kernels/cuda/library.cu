// What the library can say before any kernel runs. It loads where there is no driver, and says so by an error.
#include "device.cuh"

extern "C" {

int loraspan_cuda_emulated() { return 0; }

int loraspan_cuda_devices(int* count) { return cudaGetDeviceCount(count); }

const char* loraspan_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
}
