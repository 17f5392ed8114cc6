// NVIDIA's driver for a machine without a GPU: its memory is the host's, and a graph calls back what was captured.
// It is compiled with NVIDIA's header, so its functions have the names and types of the real driver.
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

#ifndef CAPABILITY
#define CAPABILITY 90
#endif
#ifndef MEMORY
#define MEMORY (1ull << 40)
#endif

static int capturing = 0;
static size_t used = 0;
static void (*replay)(void) = 0;

void stub_replay(void (*function)(void)) { replay = function; }
int stub_capturing(void) { return capturing; }
size_t stub_used(void) { return used; }

CUresult cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int number) {
    return *device = number, number ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? CAPABILITY / 10
             : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? CAPABILITY % 10 : device;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    return strncpy(name, device ? "none" : "Stub GPU", (size_t)length), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return *context = (CUcontext)(16 + (size_t)device), CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }
CUresult cuMemGetInfo(size_t* free, size_t* total) { return *total = MEMORY, *free = MEMORY - used, CUDA_SUCCESS; }
CUresult cuMemAlloc(CUdeviceptr* address, size_t size) {
    if (size > MEMORY - used) return CUDA_ERROR_OUT_OF_MEMORY;
    size_t* block = aligned_alloc(256, (size + 256 + 255) / 256 * 256);
    *block = size, used += size;
    return *address = (CUdeviceptr)(size_t)block + 256, CUDA_SUCCESS;
}
CUresult cuMemFree(CUdeviceptr address) {
    size_t* block = (size_t*)(size_t)(address - 256);
    return used -= *block, free(block), CUDA_SUCCESS;
}
CUresult cuStreamCreate(CUstream* stream, unsigned int flags) { return *stream = (CUstream)(size_t)(64 + flags), CUDA_SUCCESS; }
CUresult cuStreamDestroy(CUstream stream) { return stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }
CUresult cuStreamSynchronize(CUstream stream) { return capturing || !stream ? CUDA_ERROR_ILLEGAL_STATE : CUDA_SUCCESS; }
static CUresult copied(void* to, const void* from, size_t size) {
    return capturing ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : (memcpy(to, from, size), CUDA_SUCCESS);
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t size, CUstream stream) {
    return stream ? copied((void*)(size_t)to, from, size) : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t size, CUstream stream) {
    return stream ? copied(to, (void*)(size_t)from, size) : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    return stream ? copied((void*)(size_t)to, (void*)(size_t)from, size) : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
    return capturing = 1, stream && mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) { return capturing = 0, *graph = (CUgraph)stream, CUDA_SUCCESS; }
CUresult cuGraphInstantiate(CUgraphExec* runnable, CUgraph graph, unsigned long long flags) {
    return *runnable = (CUgraphExec)graph, flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec runnable, CUstream stream) {
    return runnable && stream ? (replay(), CUDA_SUCCESS) : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuGraphExecDestroy(CUgraphExec runnable) { return runnable ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }
CUresult cuGraphDestroy(CUgraph graph) { return graph ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }
