// What runs a network. One file a backend.
#pragma once

#include <thread>

#include "bundle.hpp"
#include "tensor.hpp"

namespace tw {

// It takes any number of calls at once.
class Engine {
   public:
    virtual ~Engine() = default;
    virtual Named<Tensor> run(const Named<Tensor>& inputs, const Strings& outputs) = 0;
    // Ends the call of this thread soon, if the backend can. The call then throws.
    virtual void stop(std::thread::id) {}
};

struct EngineOptions {
    int threads = 0;                  // 0: as the backend chooses
    bool low_memory = false;          // run on the mapped files: less memory, slower
    std::optional<Path> native;       // the library of our own kernels
    std::int64_t calls = 1;           // that run at the same time
};

// What an engine is opened from.
struct EngineFiles {
    std::vector<Path> paths;       // the first is the graph
    Named<Path> weights;           // location of weights in the graph -> the file
    Named<Reference> references;   // weight -> its place

    const Path& graph() const { return paths[0]; }
};

// ONNX Runtime on the CPU.
std::unique_ptr<Engine> open_ort(const EngineFiles& files, const std::string& precision, const EngineOptions& options);
std::string ort_version();
// ONNX Runtime on an NVIDIA GPU, where the linked one can.
std::unique_ptr<Engine> open_cuda(const EngineFiles& files, const std::string& precision, const EngineOptions& options);
bool ort_has_cuda();
// The library of our own kernels: TILEWRIGHT_NATIVE names one, or none if it is empty. Otherwise it lies beside this library.
std::optional<Path> native_library();
// OpenVINO on the CPU, where the library was built with it.
std::unique_ptr<Engine> open_openvino(const EngineFiles& files, const std::string& precision, const EngineOptions& options);
std::string openvino_version();
// TensorRT on an NVIDIA GPU, where the library was built with it.
std::unique_ptr<Engine> open_tensorrt(const EngineFiles& files, const std::string& precision, const EngineOptions& options);
std::string tensorrt_version();

}  // namespace tw
