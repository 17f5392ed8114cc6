#include "backends.hpp"

namespace tw {

const Named<Backend>& backends() {
    static const Named<Backend> all = {
        {"ort", {"onnxruntime", ort_version(), open_ort}},
#ifdef TW_OPENVINO
        {"openvino", {"openvino", openvino_version(), open_openvino}},
#endif
    };
    return all;
}

std::string backend_versions() {
    Strings versions;
    for (const auto& [name, backend] : backends()) versions.push_back(backend.package + " " + backend.version);
    return join(versions);
}

}  // namespace tw
