#include "gpu.hpp"

#include <dlfcn.h>

namespace tw {
namespace {

constexpr int MAJOR = 75, MINOR = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr int OUT_OF_MEMORY = 2;       // CUDA_ERROR_OUT_OF_MEMORY
constexpr unsigned NOT_BLOCKING = 1;   // CU_STREAM_NON_BLOCKING: it does not wait for the default stream
constexpr int ABSENT = -1;             // there is no driver, or it lacks the function

using Address = unsigned long long;  // CUdeviceptr

// Calls a function of the driver, whose arguments have exactly these types.
template <typename... Arguments>
int call(const char* name, Arguments... arguments) {
    static void* driver = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // once loaded, it stays
    auto* function = driver ? reinterpret_cast<int (*)(Arguments...)>(::dlsym(driver, name)) : nullptr;
    return function ? function(arguments...) : ABSENT;
}

// The same. A code that is not zero is an error.
template <typename... Arguments>
void must(const char* name, Arguments... arguments) {
    int code = call(name, arguments...);
    if (code == ABSENT) throw Error(environment, "no GPU here: NVIDIA's driver does not load");
    if (code == OUT_OF_MEMORY) throw Error(resource, std::string("GPU memory is full (") + name + "); use smaller tiles, a smaller batch or low memory");
    if (code) throw Error(environment, std::string("NVIDIA's driver refuses ") + name + " with code " + std::to_string(code) + "; see nvidia-smi");
}

Address number_of(const void* address) { return reinterpret_cast<Address>(address); }

}  // namespace

std::optional<std::array<std::int64_t, 2>> compute_capability() {
    int count = 0;
    if (call("cuInit", 0U) || call("cuDeviceGetCount", &count)) return std::nullopt;
    std::optional<std::array<std::int64_t, 2>> least;
    for (int number = 0; number < count; ++number) {
        int device = 0, major = 0, minor = 0;
        if (call("cuDeviceGet", &device, number) || call("cuDeviceGetAttribute", &major, MAJOR, device) || call("cuDeviceGetAttribute", &minor, MINOR, device))
            continue;
        std::array<std::int64_t, 2> its{major, minor};
        if (!least || its < *least) least = its;
    }
    return least;
}

std::optional<std::int64_t> gpu_available_bytes() {
    try {
        Gpu::Use use(Gpu::first());
        std::size_t free = 0, total = 0;
        must("cuMemGetInfo_v2", &free, &total);
        return static_cast<std::int64_t>(free);
    } catch (const Error&) {
        return std::nullopt;
    }
}

Gpu& Gpu::first() {
    static auto* gpu = new Gpu;  // never freed: the driver may have ended before
    return *gpu;
}

Gpu::Gpu() {
    int device = 0;
    must("cuInit", 0U);
    must("cuDeviceGet", &device, 0);
    must("cuDevicePrimaryCtxRetain", &context_, device);  // which libraries over the CUDA runtime share
    Use use(*this);
    must("cuStreamCreate", &stream_, NOT_BLOCKING);
}

Gpu::Use::Use(Gpu& gpu) : guard_(gpu.lock_) { must("cuCtxSetCurrent", gpu.context_); }

void Gpu::fill(void* to, const void* from, std::size_t bytes) { must("cuMemcpyHtoDAsync_v2", number_of(to), from, bytes, stream_); }

void Gpu::read(void* to, const void* from, std::size_t bytes) { must("cuMemcpyDtoHAsync_v2", to, number_of(from), bytes, stream_); }

void Gpu::wait() { must("cuStreamSynchronize", stream_); }

void* Gpu::scratch(std::size_t bytes) {
    if (!scratch_ || scratch_->bytes() < bytes) {
        scratch_.reset();  // which waits for work that uses it
        scratch_.emplace(*this, bytes);
    }
    return scratch_->address();
}

Gpu::Block::Block(Gpu& gpu, std::size_t bytes) : gpu_(gpu), bytes_(bytes) {
    Address address = 0;
    Use use(gpu);
    must("cuMemAlloc_v2", &address, bytes ? bytes : 1);
    address_ = reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr): the driver's addresses are numbers
}

Gpu::Block::~Block() {
    std::lock_guard<std::recursive_mutex> guard(gpu_.lock_);
    call("cuCtxSetCurrent", gpu_.context_);
    call("cuStreamSynchronize", gpu_.stream_);  // work in the stream may still use it
    call("cuMemFree_v2", number_of(address_));
}

}  // namespace tw
