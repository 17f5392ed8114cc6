// What runs a network. One file a backend.
#pragma once

#include <functional>
#include <memory>

#include "bundle.hpp"
#include "plan.hpp"

namespace tw {

// A dense array. Copies share the numbers, which nobody changes.
struct Tensor {
    std::string dtype;
    Shape shape;
    std::shared_ptr<const void> data;

    std::size_t count() const;
    std::size_t bytes() const;
    const float* floats() const { return static_cast<const float*>(data.get()); }
    bool same(const Tensor& other) const;
};

std::size_t width_of(const std::string& dtype);  // bytes of an element
Tensor tensor_of(Floats&& numbers, Shape shape);
Tensor tensor_of(const std::string& dtype, Shape shape, const void* data);  // copies

class Engine {
   public:
    virtual ~Engine() = default;
    virtual Named<Tensor> run(const Named<Tensor>& inputs, const Strings& outputs) = 0;
};

struct EngineOptions {
    int threads = 0;                  // 0: as the backend chooses
    bool low_memory = false;          // run on the mapped files: less memory, slower
    std::optional<Path> native;       // the library of our own kernels
};

// ONNX Runtime on the CPU. `files`: location of weights in the graph -> the file.
std::unique_ptr<Engine> open_ort(const Path& graph, const Named<Path>& files, const std::string& precision, const EngineOptions& options);
std::string ort_version();

}  // namespace tw
