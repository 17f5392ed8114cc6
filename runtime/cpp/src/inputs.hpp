// A caller's arguments as arrays. As runtime/inputs.py, but for words: no tokenizer is linked.
#pragma once

#include "engine.hpp"

namespace tw {

struct Value {
    std::string name;
    std::optional<std::string> text;
    Tensor array;  // without a text
};

Named<Tensor> gather(const Bundle& bundle, const std::vector<Value>& values);

// The tensors of a safetensors file, mapped. bfloat16 becomes float32.
Named<Tensor> read_tensors(const Path& path);

}  // namespace tw
