// A target of libFuzzer: the readers of a bundle's files either accept bytes or refuse them with tw::Error, as they promise.
// The first byte chooses the reader; see corpus.py.
#include "bundle.hpp"

using namespace tw;

namespace {

// A program, and the signatures of the components and constants around it.
void program(const std::string& text) {
    Json document = parse_json(text, "program.json");
    const Json *inner = document.find("program"), *components = document.find("components"), *constants = document.find("constants");
    Program program = read_program(inner ? *inner : document, "program.json");
    check_arguments(program);
    arguments_of(program);
    Named<Signature> signatures;
    Named<TensorSpec> specs;
    if (components)
        for (const auto& [name, signature] : components->members) signatures[name] = read_signature(signature, name);
    if (constants)
        for (const auto& [name, spec] : constants->members) specs[name] = read_tensor_spec(spec, name);
    check_program(program, signatures, specs);
}

void graph(const std::string& bytes) {
    Named<std::string> locations;
    for (const auto& [name, external] : external_data(bytes, "graph.onnx")) locations[name] = external.location + ".moved";
    relocated(bytes, locations, "graph.onnx");
    with_inputs(bytes, "graph.onnx");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (!size) return 0;
    std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
    try {
        switch (data[0]) {
            case 'm': read_manifest(parse_json(bytes, "bundle.json"), "bundle.json"); break;
            case 'p': program(bytes); break;
            case 'w': read_weights(parse_json(bytes, "weights.json"), "weights.json"); break;
            case 's': safetensors_header(data + 1, size - 1, "constants.safetensors"); break;
            case 'g': graph(bytes); break;
            default: return -1;  // not for the corpus
        }
    } catch (const Error& error) {
        if (one_line(error.what(), SIZE_MAX) != error.what()) __builtin_trap();  // a message is one line
    }
    return 0;
}
