#include "backends.hpp"

#ifdef TW_AOTI
#include <dlfcn.h>
#endif

namespace tw {
namespace {

#ifdef TW_AOTI
// From a library beside this one, which is loaded for the first bundle that needs it.
std::unique_ptr<Engine> open_aoti(const EngineFiles& files, const std::string&, const EngineOptions& options) {
    using Open = Engine* (*)(const EngineFiles&, const EngineOptions&);
    static const char* const name = "libtilewright_aoti.so";
    void* library = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);  // once loaded, it stays
    void* open = library ? ::dlsym(library, "tw_open_aoti") : nullptr;
    if (!open)
        throw Error(environment, one_line(files.graph().string() + ": " + ::dlerror() + "; keep " + name + " beside libtilewright.so, and PyTorch " TW_AOTI +
                                          " where it was when they were built"));
    return std::unique_ptr<Engine>(reinterpret_cast<Open>(open)(files, options));
}
#endif

}  // namespace

const Named<Backend>& backends() {
    static const Named<Backend> all = [] {
        Named<Backend> built = {
            {"ort", {"onnxruntime", ort_version(), open_ort}},
#ifdef TW_OPENVINO
            {"openvino", {"openvino", openvino_version(), open_openvino}},
#endif
#ifdef TW_TENSORRT
            {"tensorrt", {"tensorrt", tensorrt_version(), open_tensorrt}},
#endif
#ifdef TW_AOTI
            {"aoti", {"torch", TW_AOTI, open_aoti}},
#endif
        };
        if (ort_has_cuda()) built["cuda"] = {"onnxruntime", ort_version(), open_cuda};
        return built;
    }();
    return all;
}

std::string backend_versions() {
    Strings versions;
    for (const auto& [name, backend] : backends()) versions.push_back(backend.package + " " + backend.version);
    return join(versions);
}

}  // namespace tw
