#include "inputs.hpp"

#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>

namespace tw {
namespace {

// ---- numbers in the type of an input

template <class T>
bool put(std::vector<char>& bytes, double number) {
    if (!std::numeric_limits<T>::is_integer && !std::isfinite(static_cast<T>(number))) return false;
    if (std::numeric_limits<T>::is_integer) {
        bool fits = number == std::floor(number) && number >= static_cast<double>(std::numeric_limits<T>::min()) &&
                    number < std::ldexp(1.0, std::numeric_limits<T>::digits);
        if (!fits) return false;
    }
    T value = static_cast<T>(number);
    const char* raw = reinterpret_cast<const char*>(&value);
    bytes.insert(bytes.end(), raw, raw + sizeof value);
    return true;
}

bool put_number(std::vector<char>& bytes, const std::string& dtype, double number) {
    if (dtype == "float32") return put<float>(bytes, number);
    if (dtype == "float64") return put<double>(bytes, number);
    if (dtype == "int64") return put<std::int64_t>(bytes, number);
    if (dtype == "int32") return put<std::int32_t>(bytes, number);
    if (dtype == "int16") return put<std::int16_t>(bytes, number);
    if (dtype == "int8") return put<std::int8_t>(bytes, number);
    if (dtype == "uint8") return put<std::uint8_t>(bytes, number);
    if (dtype == "bool") return (number == 0 || number == 1) && put<std::uint8_t>(bytes, number);
    throw Error(environment, "this library makes no " + dtype + " from a number; give an array");
}

std::optional<double> number_of(const std::string& text) {
    double number = 0;
    const char *begin = text.data(), *end = begin + text.size();
    auto result = std::from_chars(begin + (text[0] == '+'), end, number);
    if (text.empty() || result.ec != std::errc() || result.ptr != end || !std::isfinite(number)) return std::nullopt;
    return number;
}

Tensor single(const std::string& name, const Input& spec, const std::string& text, bool standard) {
    const Argument argument = argument_of(spec);
    const std::string wrong = name + "=" + one_line(text) + " is not " + argument.takes();
    std::optional<double> number = number_of(text);
    if (auto choice = spec.choices.find(text); choice != spec.choices.end()) number = static_cast<double>(choice->second);
    bool fits = number.has_value();
    if (fits && !spec.choices.empty()) {
        fits = false;
        for (const auto& [choice, value] : spec.choices) fits = fits || static_cast<double>(value) == *number;
    }
    std::vector<char> bytes;
    fits = fits && put_number(bytes, spec.dtype, *number);
    if (fits && !standard) {
        double rounded = spec.dtype == "float32" ? static_cast<double>(static_cast<float>(*number)) : *number;
        auto bound = [&](const Scalar& limit) { return spec.dtype == "float32" ? static_cast<double>(static_cast<float>(limit.number)) : limit.number; };
        fits = (spec.least.kind == Scalar::none || rounded >= bound(spec.least)) && (spec.most.kind == Scalar::none || rounded <= bound(spec.most));
    }
    if (!fits) throw Error(usage, wrong);
    return tensor_of(spec.dtype, {1}, bytes.data());
}

Tensor array(const std::string& name, const Input& spec, const std::string& text) {
    std::vector<char> bytes;
    std::int64_t count = 0;
    for (std::size_t at = 0; at <= text.size(); ++count) {
        std::size_t end = std::min(text.find(',', at), text.size());
        std::string part = text.substr(at, end - at);
        while (!part.empty() && part[0] == ' ') part.erase(0, 1);
        auto number = number_of(part);
        if (!number || !put_number(bytes, spec.dtype, *number)) throw Error(usage, name + ": " + repr(one_line(part)) + " is no " + spec.dtype);
        at = end + 1;
    }
    std::int64_t size = 1;
    for (auto side : spec.shape) size *= side;
    if (count != size) throw Error(usage, name + " has " + std::to_string(count) + " numbers; give " + std::to_string(size) + ", for an array of " + repr(spec.shape));
    return tensor_of(spec.dtype, spec.shape, bytes.data());
}

Tensor fitting(const std::string& where, const Tensor& tensor, const TensorSpec& spec, Code code) {
    if (tensor.dtype != spec.dtype) throw Error(code, where + " is no tensor of " + spec.dtype + "; use this bundle's own");
    bool fits = tensor.shape.size() == spec.shape.size();
    for (std::size_t i = 0; fits && i < spec.shape.size(); ++i) fits = spec.shape[i].named() ? tensor.shape[i] > 0 : spec.shape[i].size == tensor.shape[i];
    if (!fits) throw Error(code, where + " has shape " + repr(tensor.shape) + ", this bundle takes " + repr(spec.shape) + "; use its own");
    for (std::size_t i = 0; tensor.dtype == "float32" && i < tensor.count(); ++i) {
        float value = 0;
        std::memcpy(&value, static_cast<const char*>(tensor.data.get()) + 4 * i, 4);
        if (!std::isfinite(value)) throw Error(code, where + " holds " + repr(static_cast<double>(value)) + " as float32; give finite numbers");
    }
    return tensor;
}

// The values of passes without tiles, which a caller may give instead. Each is one row.
Named<TensorSpec> values_of(const Bundle& bundle) {
    Named<TensorSpec> specs;
    for (const auto& p : bundle.program.passes)
        if (!p.tiles)
            for (const auto& placed : p.calls())
                for (const auto& [name, target] : placed.call->outputs)
                    specs[target] = bundle.manifest.components.at(placed.call->run).outputs.at(name).rows({1, ""});
    return specs;
}

}  // namespace

Named<Tensor> read_tensors(const Path& path) {
    auto file = std::make_shared<Mapped>(path);
    Named<Tensor> tensors;
    for (const auto& [name, stored] : safetensors_header(file->data(), file->size(), path.string())) {
        Tensor tensor{stored.spec.dtype, {}, std::shared_ptr<const void>(file, file->data() + stored.start)};
        for (const auto& dim : stored.spec.shape) tensor.shape.push_back(dim.size);
        if (tensor.dtype == "bfloat16") {
            Floats wide(tensor.count());
            for (std::size_t i = 0; i < wide.size(); ++i) std::memcpy(reinterpret_cast<char*>(&wide[i]) + 2, file->data() + stored.start + 2 * i, 2);
            tensor = tensor_of(std::move(wide), tensor.shape);
        }
        if (tensor.dtype.rfind("float8", 0) == 0)
            throw Error(damaged, path.string() + ": " + repr(name) + " is " + tensor.dtype + ", which no program reads; store it as float32");
        tensors[name] = tensor;
    }
    return tensors;
}

Named<Tensor> gather(const Bundle& bundle, const std::vector<Value>& values) {
    const Program& program = bundle.program;
    Named<TensorSpec> specs = values_of(bundle);
    Named<Tensor> inputs;
    std::set<std::string> by_files;
    for (const auto& value : values) {
        const std::string& name = value.name;
        auto input = program.inputs.find(name);
        bool whole_input = input != program.inputs.end();
        if (!program.texts.count(name) && !program.files.count(name) && !whole_input && !specs.count(name)) {
            Strings listed = keys(bundle.manifest.arguments);
            throw Error(usage, "unknown argument " + repr(one_line(name)) + "; this bundle takes " + (listed.empty() ? "no arguments of its own" : join(listed)));
        }
        if (program.texts.count(name))
            throw Error(environment, name + ": this library has no tokenizer; give the token ids as " + join(keys(program.texts.at(name).ids)) + " instead");
        if (auto file = program.files.find(name); file != program.files.end()) {
            if (!value.text) throw Error(usage, name + " is not a safetensors file; give its path");
            Named<Tensor> tensors;
            try {
                tensors = read_tensors(*value.text);
            } catch (const Error& error) {
                throw Error(Code::input, one_line(error.what()) + "; give a safetensors file with " + join(keys(file->second.tensors)));
            }
            for (const auto& [tensor, target] : file->second.tensors) {
                if (!tensors.count(tensor))
                    throw Error(Code::input, *value.text + ": lacks the tensor " + repr(tensor) + "; give one with " + join(keys(file->second.tensors)));
                TensorSpec spec = program.inputs.count(target) ? program.inputs.at(target).spec() : specs.at(target);
                inputs[target] = fitting(*value.text + ": " + repr(tensor), tensors.at(tensor), spec, Code::input);
                by_files.insert(target);
            }
        } else if (whole_input) {
            const Input& spec = input->second;
            if (value.text) {
                inputs[name] = spec.shape.empty() ? single(name, spec, *value.text, false) : array(name, spec, *value.text);
            } else {
                inputs[name] = fitting(name, value.array, spec.spec(), usage);
            }
        } else {
            if (value.text) throw Error(usage, name + " is an array; give its numbers, not a text");
            inputs[name] = fitting(name, value.array, specs.at(name), usage);
        }
    }
    for (const auto& [name, spec] : program.inputs) {
        bool number = spec.standard.kind == Scalar::whole || spec.standard.kind == Scalar::real;
        if (number && !inputs.count(name)) inputs[name] = single(name, spec, spec.standard.repr(), true);
    }
    for (const auto& [name, text] : program.texts) {
        bool given = !by_files.empty();
        for (const auto& [target, file] : text.ids) given = given || inputs.count(target);
        if (!given && text.standard)
            throw Error(environment, name + ": this library has no tokenizer; give the token ids of the words " + repr(one_line(*text.standard)) + " as " +
                                         join(keys(text.ids)));
    }
    return inputs;
}

}  // namespace tw
