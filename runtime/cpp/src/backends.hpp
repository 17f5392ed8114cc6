// The backends that this library was built with, and that the linked libraries have.
#pragma once

#include "engine.hpp"

namespace tw {

struct Backend {
    std::string package, version;  // as the `needs` of an engine name them
    std::unique_ptr<Engine> (*open)(const EngineFiles& files, const std::string& precision, const EngineOptions& options);
};

const Named<Backend>& backends();  // name -> backend
std::string backend_versions();    // "onnxruntime 1.31.1"

}  // namespace tw
