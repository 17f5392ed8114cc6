// Runs a package of AOTInductor on each of the inputs, and writes INPUTS.NAME for each output.
//   packages PACKAGE WEIGHTS THREADS OUTPUT[,OUTPUT] INPUTS...       (WEIGHTS and INPUTS are safetensors files)
#include <cstdio>
#include <fstream>

#include "backends.hpp"
#include "inputs.hpp"

using namespace tw;

int main(int count, char** words) {
    if (count < 6) return std::fputs("usage: packages PACKAGE WEIGHTS THREADS OUTPUTS INPUTS...\n", stderr), 2;
    const Path package = words[1], weights = words[2];
    EngineFiles files{{package, Path(package).replace_extension(".safetensors")}, {}, {}};
    Mapped mapped(weights);
    for (const auto& [name, stored] : safetensors_header(mapped.data(), mapped.size(), weights.string())) {
        Reference reference{weights.filename().string(), stored.spec.dtype, {}, stored.start, stored.length, "mine"};
        for (const auto& dim : stored.spec.shape) reference.shape.push_back(dim.size);
        files.references[name] = reference;
        files.weights[reference.location()] = weights;
    }
    EngineOptions options;
    options.threads = std::stoi(words[3]);
    Strings outputs;
    const std::string list = words[4];
    for (std::size_t at = 0; at <= list.size();) {
        std::size_t end = std::min(list.find(',', at), list.size());
        outputs.push_back(list.substr(at, end - at));
        at = end + 1;
    }
    try {
        auto engine = backends().at("aoti").open(files, "float32", options);
        for (int i = 5; i < count; ++i) {
            try {
                for (const auto& [name, tensor] : engine->run(read_tensors(words[i]), outputs)) {
                    std::ofstream(std::string(words[i]) + "." + name, std::ios::binary).write(static_cast<const char*>(tensor.data.get()), static_cast<std::streamsize>(tensor.bytes()));
                    std::printf("%s %s %s\n", name.c_str(), tensor.dtype.c_str(), repr(tensor.shape).c_str());
                }
            } catch (const Error& error) {
                std::printf("%d %s\n", error.code, error.what());
            }
        }
    } catch (const Error& error) {
        return std::fprintf(stderr, "%s\n", error.what()), error.code;
    }
    return 0;
}
