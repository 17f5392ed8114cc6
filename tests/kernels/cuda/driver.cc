// Stands in for NVIDIA's driver: one device of compute capability 9.0, whose kernels are a function of the test's.
//
// It refuses what the real one refuses: a launch without a context, without code, or with more shared memory than the
// kernel was allowed.
#include <cuda.h>

#include <cstring>
#include <string>

using Run = void (*)(const char* kernel, const unsigned* grid, unsigned threads, unsigned shared, void** parameters);

namespace {

Run run = nullptr;
int contexts = 0;  // pushed and not popped
struct Function {
  std::string kernel;
  unsigned allowed = 48 * 1024;
};

}  // namespace

extern "C" {

void stand_in(Run by) { run = by; }
int contexts_left() { return contexts; }

CUresult CUDAAPI cuGetErrorName(CUresult, const char** name) {
  *name = "CUDA_ERROR_OF_THE_TEST";
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuStreamGetCtx(CUstream, CUcontext* context) {
  *context = reinterpret_cast<CUcontext>(&contexts);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxPushCurrent(CUcontext) {
  ++contexts;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxPopCurrent(CUcontext*) {
  --contexts;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return contexts ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void* image) {
  *module = reinterpret_cast<CUmodule>(&contexts);
  return contexts && !std::memcmp(image, "\x7f" "ELF", 4) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule, const char* kernel) {
  *function = reinterpret_cast<CUfunction>(new Function{kernel});
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  reinterpret_cast<Function*>(function)->allowed = static_cast<unsigned>(value);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                                unsigned, unsigned shared, CUstream, void** parameters, void**) {
  const Function& called = *reinterpret_cast<Function*>(function);
  if (!contexts || !run || !x || !y || !z || shared > called.allowed) return CUDA_ERROR_INVALID_VALUE;
  const unsigned grid[3] = {x, y, z};
  run(called.kernel.c_str(), grid, threads, shared, parameters);
  return CUDA_SUCCESS;
}
}
