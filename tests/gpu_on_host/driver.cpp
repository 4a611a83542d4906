// What else PyTorch asks for when it is loaded: places for its compiled kernels, none of which can
// run, and the driver's names, with a context behind them and nothing more.
#include <cuda_runtime_api.h>

#include <cstddef>

namespace {

constexpr int kNoDriver = 801;  // CUDA_ERROR_NOT_SUPPORTED

int no_driver() { return kNoDriver; }

}  // namespace

extern "C" {

// --- compiled kernels, which cannot run ----------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}

void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}

cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return cudaErrorNoKernelImageForDevice;
}

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return cudaErrorNoKernelImageForDevice;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  return cudaErrorNoKernelImageForDevice;
}

// --- the driver, of which PyTorch wants the names and a context ----------------------------------

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&no_driver);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

int cuCtxGetCurrent(void** context) {
  static int only;
  *context = &only;
  return 0;
}

int cuCtxSetCurrent(void*) { return 0; }

#define NO_DRIVER(name) \
  int name() { return kNoDriver; }
NO_DRIVER(cuDeviceGet)
NO_DRIVER(cuDeviceGetAttribute)
NO_DRIVER(cuDevicePrimaryCtxRetain)
NO_DRIVER(cuFuncGetAttribute)
NO_DRIVER(cuFuncSetAttribute)
NO_DRIVER(cuFuncSetCacheConfig)
NO_DRIVER(cuGetErrorString)
NO_DRIVER(cuLaunchCooperativeKernel)
NO_DRIVER(cuLaunchKernel)
NO_DRIVER(cuLinkAddData_v2)
NO_DRIVER(cuLinkComplete)
NO_DRIVER(cuLinkCreate_v2)
NO_DRIVER(cuModuleGetFunction)
NO_DRIVER(cuModuleLoad)
NO_DRIVER(cuModuleLoadData)
NO_DRIVER(cuModuleLoadDataEx)
NO_DRIVER(cuModuleUnload)
NO_DRIVER(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NO_DRIVER(cuPointerGetAttribute)
NO_DRIVER(cuTensorMapEncodeTiled)

}  // extern "C"
