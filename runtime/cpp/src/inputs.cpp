#include "inputs.hpp"

#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>

namespace tw {
namespace {

// ---- numbers in the type of an input

template <class T>
void append(std::vector<char>& bytes, T value) {
    const char* raw = reinterpret_cast<const char*>(&value);
    bytes.insert(bytes.end(), raw, raw + sizeof value);
}

// Reads all of a text; false if it is no number of that type.
template <class T>
bool read_all(const std::string& text, T& value) {
    const char *begin = text.data(), *end = begin + text.size();
    if (text.size() > 1 && text[0] == '+' && text[1] != '-') ++begin;
    auto result = std::from_chars(begin, end, value);
    return result.ec == std::errc() && result.ptr == end;
}

template <class T>
bool put_real(std::vector<char>& bytes, const std::string& text) {
    double number = 0;
    if (!read_all(text, number) || !std::isfinite(static_cast<T>(number))) return false;
    append(bytes, static_cast<T>(number));
    return true;
}

template <class T>
bool put_whole(std::vector<char>& bytes, const std::string& text) {
    T number = 0;
    bool fits = read_all(text, number);
    if (fits) append(bytes, number);
    return fits;
}

bool put_number(std::vector<char>& bytes, const std::string& dtype, const std::string& text) {
    if (dtype == "float32") return put_real<float>(bytes, text);
    if (dtype == "float64") return put_real<double>(bytes, text);
    if (dtype == "int64") return put_whole<std::int64_t>(bytes, text);
    if (dtype == "int32") return put_whole<std::int32_t>(bytes, text);
    if (dtype == "int16") return put_whole<std::int16_t>(bytes, text);
    if (dtype == "int8") return put_whole<std::int8_t>(bytes, text);
    if (dtype == "uint8") return put_whole<std::uint8_t>(bytes, text);
    if (dtype == "bool") return (text == "0" || text == "1") && put_whole<std::uint8_t>(bytes, text);
    throw Error(environment, "this library makes no " + dtype + " from a number; give an array");
}

// A number of an array, as a double.
template <class T>
double number_at(const Tensor& tensor, std::size_t place) {
    T value;
    std::memcpy(&value, static_cast<const char*>(tensor.data.get()) + place * sizeof value, sizeof value);
    return static_cast<double>(value);
}

double number_at(const Tensor& tensor, std::size_t place) {
    if (tensor.dtype == "float32") return number_at<float>(tensor, place);
    if (tensor.dtype == "float64") return number_at<double>(tensor, place);
    if (tensor.dtype == "int64") return number_at<std::int64_t>(tensor, place);
    if (tensor.dtype == "int32") return number_at<std::int32_t>(tensor, place);
    if (tensor.dtype == "int16") return number_at<std::int16_t>(tensor, place);
    if (tensor.dtype == "int8") return number_at<std::int8_t>(tensor, place);
    if (tensor.dtype == "uint8" || tensor.dtype == "bool") return number_at<std::uint8_t>(tensor, place);
    throw Error(environment, "this library compares no numbers of " + tensor.dtype + "; use a bundle whose input has another type");
}

// A bound as NumPy rounds it to a type.
double rounded(double bound, const std::string& dtype) {
    if (dtype == "float32") return static_cast<double>(static_cast<float>(bound));
    return is_float(dtype) ? bound : std::trunc(bound);
}

// Refuses numbers that are no choice, or outside of the range. `shown` is the value for the message.
void require_allowed(const std::string& shown, const Input& spec, const Tensor& tensor) {
    bool ranged = spec.least.kind != Scalar::none || spec.most.kind != Scalar::none;
    if (!ranged && spec.choices.empty()) return;
    for (std::size_t i = 0; i < tensor.count(); ++i) {
        double number = number_at(tensor, i);
        bool fits = spec.choices.empty();
        for (const auto& [choice, value] : spec.choices) fits = fits || static_cast<double>(value) == number;
        fits = fits && (spec.least.kind == Scalar::none || number >= rounded(spec.least.number, spec.dtype));
        fits = fits && (spec.most.kind == Scalar::none || number <= rounded(spec.most.number, spec.dtype));
        if (!fits) throw Error(usage, shown + " is not " + argument_of(spec).takes());
    }
}

Tensor single(const std::string& name, const Input& spec, const std::string& text) {
    const std::string shown = name + "=" + one_line(text);
    auto choice = spec.choices.find(text);
    std::vector<char> bytes;
    bool fits = spec.choices.empty() || choice != spec.choices.end();
    fits = fits && put_number(bytes, spec.dtype, spec.choices.empty() ? text : std::to_string(choice->second));
    if (!fits) throw Error(usage, shown + " is not " + argument_of(spec).takes());
    Tensor tensor = tensor_of(spec.dtype, {1}, bytes.data());
    require_allowed(shown, spec, tensor);
    return tensor;
}

Tensor standard(const Input& spec) {
    std::vector<char> bytes;
    if (!put_number(bytes, spec.dtype, spec.standard.repr())) throw Error(usage, "the default " + spec.standard.repr() + " is not " + argument_of(spec).takes());
    return tensor_of(spec.dtype, {1}, bytes.data());
}

Tensor array(const std::string& name, const Input& spec, const std::string& text) {
    std::vector<char> bytes;
    std::int64_t count = 0;
    for (std::size_t at = 0; at <= text.size(); ++count) {
        std::size_t end = std::min(text.find(',', at), text.size());
        std::string part = text.substr(at, end - at);
        while (!part.empty() && part[0] == ' ') part.erase(0, 1);
        if (!put_number(bytes, spec.dtype, part)) throw Error(usage, name + ": " + repr(one_line(part)) + " is no " + spec.dtype);
        at = end + 1;
    }
    std::int64_t size = 1;
    for (auto side : spec.shape) size *= side;
    if (count != size) throw Error(usage, name + " has " + std::to_string(count) + " numbers; give " + std::to_string(size) + ", for an array of " + repr(spec.shape));
    Tensor tensor = tensor_of(spec.dtype, spec.shape, bytes.data());
    require_allowed(name + ", an array,", spec, tensor);
    return tensor;
}

Tensor fitting(const std::string& where, const Tensor& tensor, const TensorSpec& spec, Code code) {
    if (tensor.dtype != spec.dtype) throw Error(code, where + " is no tensor of " + spec.dtype + "; use this bundle's own");
    bool fits = tensor.shape.size() == spec.shape.size();
    for (std::size_t i = 0; fits && i < spec.shape.size(); ++i) fits = spec.shape[i].named() ? tensor.shape[i] > 0 : spec.shape[i].size == tensor.shape[i];
    if (!fits) throw Error(code, where + " has shape " + repr(tensor.shape) + ", this bundle takes " + repr(spec.shape) + "; use its own");
    if (NotFinite found = not_finite(tensor); found.count) throw Error(code, where + " holds " + repr(found.first) + " as " + tensor.dtype + "; give finite numbers");
    return tensor;
}

// The array that a caller gives for an input, with the words for it in a message.
Tensor fitting(const std::string& name, const Tensor& tensor, const Input& spec) {
    fitting(name, tensor, spec.spec(), usage);
    bool one = spec.shape.empty() && (!spec.choices.empty() || spec.least.kind != Scalar::none || spec.most.kind != Scalar::none);
    require_allowed(one ? name + "=" + repr(number_at(tensor, 0)) : name + ", an array,", spec, tensor);
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
    std::set<std::string> by_files, names;
    for (const auto& value : values) {
        const std::string& name = value.name;
        if (!names.insert(name).second) throw Error(usage, repr(one_line(name)) + " is given twice; give it once");
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
                auto whole = program.inputs.find(target);
                TensorSpec spec = whole != program.inputs.end() ? whole->second.spec() : specs.at(target);
                bool single_number = whole != program.inputs.end() && whole->second.shape.empty();
                if (single_number) spec.shape.clear();  // in a file it has no axis of rows
                inputs[target] = fitting(*value.text + ": " + repr(tensor), tensors.at(tensor), spec, Code::input);
                if (single_number) inputs[target].shape = {1};
                if (whole != program.inputs.end()) fitting(target, inputs[target], whole->second);
                by_files.insert(target);
            }
        } else if (whole_input) {
            const Input& spec = input->second;
            if (value.text) {
                inputs[name] = spec.shape.empty() ? single(name, spec, *value.text) : array(name, spec, *value.text);
            } else {
                inputs[name] = fitting(name, value.array, spec);
            }
        } else {
            if (value.text) throw Error(usage, name + " is an array; give its numbers, not a text");
            inputs[name] = fitting(name, value.array, specs.at(name), usage);
        }
    }
    for (const auto& [name, spec] : program.inputs) {
        bool number = spec.standard.kind == Scalar::whole || spec.standard.kind == Scalar::real;
        if (number && !inputs.count(name)) inputs[name] = standard(spec);
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
