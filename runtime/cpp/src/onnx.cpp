// Reading and changing the references of an ONNX file to bytes in other files. As runtime/bundle/external_data.py.
#include <algorithm>
#include <functional>

#include "bundle.hpp"

namespace tw {
namespace {

constexpr int DEEPEST_GRAPH = 100;
const std::map<std::int64_t, std::string> KINDS = {
    {1, "float32"}, {2, "uint8"},    {3, "int8"},     {5, "int16"},     {6, "int32"},          {7, "int64"},
    {9, "bool"},    {10, "float16"}, {11, "float64"}, {16, "bfloat16"}, {17, "float8_e4m3fn"}, {19, "float8_e5m2"}};
enum Message { model, training, function, graph, node, attribute, sparse, tensor };
const std::map<Message, std::map<std::uint64_t, Message>> INSIDE = {
    {model, {{7, graph}, {20, training}, {25, function}}},
    {training, {{1, graph}, {2, graph}}},
    {function, {{7, node}, {11, attribute}}},
    {graph, {{1, node}, {5, tensor}, {15, sparse}}},
    {node, {{5, attribute}}},
    {attribute, {{5, tensor}, {6, graph}, {10, tensor}, {11, graph}, {22, sparse}, {23, sparse}}},
    {sparse, {{1, tensor}, {2, tensor}}}};

struct Span {
    std::size_t at, end;
};

struct Field {
    std::uint64_t number;
    bool bytes;  // a span; else a number
    Span span;
    std::uint64_t value;
    Span whole;
};

std::uint64_t varint(const std::string& data, std::size_t& at, std::size_t end) {
    std::uint64_t value = 0;
    for (int shift = 0; at < end && shift < 70; shift += 7) {
        auto byte = static_cast<unsigned char>(data[at++]);
        if (shift < 64) value |= std::uint64_t{byte & 127U} << shift;
        if (byte < 128) return value;
    }
    throw Invalid("no number at byte " + std::to_string(at));
}

void fields(const std::string& data, Span span, const std::function<void(const Field&)>& visit) {
    for (std::size_t at = span.at; at < span.end;) {
        Field field{};
        field.whole.at = at;
        std::uint64_t tag = varint(data, at, span.end);
        field.number = tag >> 3;
        std::uint64_t size = 0;
        switch (tag & 7) {
            case 0: field.value = varint(data, at, span.end); break;
            case 2: size = varint(data, at, span.end); break;
            case 1: size = 8; break;
            case 5: size = 4; break;
            default: throw Invalid("a field of kind " + std::to_string(tag & 7) + " at byte " + std::to_string(at));
        }
        if (size > span.end - at) throw Invalid("cut short at byte " + std::to_string(span.end));
        field.bytes = (tag & 7) != 0;
        field.span = {at, at + size};
        at += size;
        field.whole.end = at;
        visit(field);
    }
}

Span bytes(const Field& field) {
    if (!field.bytes) throw Invalid("a field is of another kind than onnx gives it");
    return field.span;
}

std::string text(const std::string& data, const Field& field) {
    Span span = bytes(field);
    return data.substr(span.at, span.end - span.at);
}

std::int64_t number(const std::string& digits) {
    bool plain = !digits.empty() && digits.size() < 19 && digits.find_first_not_of("0123456789") == std::string::npos;
    if (!plain) throw Invalid(repr(digits) + " is no offset and no length");
    return std::stoll(digits);
}

// The name of a tensor, and the place of its bytes if they are in another file.
std::pair<std::string, std::optional<External>> read_tensor(const std::string& data, Span span) {
    std::string name;
    std::uint64_t kind = 0;
    bool outside = false;
    Shape shape;
    Named<std::string> entries;
    fields(data, span, [&](const Field& field) {
        if (field.number == 1 && !field.bytes) shape.push_back(static_cast<std::int64_t>(field.value));
        if (field.number == 1 && field.bytes)
            for (std::size_t at = field.span.at; at < field.span.end;) shape.push_back(static_cast<std::int64_t>(varint(data, at, field.span.end)));
        if (field.number == 2) {
            if (field.bytes) throw Invalid("a field is of another kind than onnx gives it");
            kind = field.value;
        }
        if (field.number == 8) name = text(data, field);
        if (field.number == 14 && !field.bytes && field.value == 1) outside = true;
        if (field.number != 13) return;
        outside = true;
        std::string key, value;
        fields(data, bytes(field), [&](const Field& part) {
            if (part.number == 1) key = text(data, part);
            if (part.number == 2) value = text(data, part);
        });
        if (!entries.emplace(key, value).second) throw Invalid(repr(name) + " says its " + repr(key) + " twice");
    });
    if (!outside) return {name, std::nullopt};
    for (const auto& [key, value] : entries)
        if (key != "location" && key != "offset" && key != "length") throw Invalid(repr(name) + " says its " + repr(key) + ", which no bundle does");
    auto dtype = KINDS.find(static_cast<std::int64_t>(kind));
    if (dtype == KINDS.end()) throw Invalid(repr(name) + " is of type " + std::to_string(kind) + ", which no bundle holds");
    std::int64_t offset = entries.count("offset") ? number(entries["offset"]) : 0;
    return {name, External{entries["location"], dtype->second, offset, number(entries["length"]), shape}};
}

void tensors(const std::string& data, std::vector<Message>& path, Span span, const std::function<void(Span)>& visit) {
    if (path.size() > DEEPEST_GRAPH) throw Invalid("nested too deeply");
    const auto& inside = INSIDE.at(path.back());
    fields(data, span, [&](const Field& field) {
        auto message = inside.find(field.number);
        if (message == inside.end()) return;
        Span part = bytes(field);
        if (std::string_view(data).substr(part.at, part.end - part.at).find("location") == std::string_view::npos) return;
        path.push_back(message->second);
        if (message->second == tensor) {
            visit(part);
        } else {
            tensors(data, path, part, visit);
        }
        path.pop_back();
    });
}

std::string written(std::uint64_t value) {
    std::string out;
    for (; value >> 7; value >>= 7) out += static_cast<char>((value & 127) | 128);
    return out + static_cast<char>(value);
}

std::string message(std::uint64_t number, const std::string& data) { return written(number << 3 | 2) + written(data.size()) + data; }

// A message with every field of this number changed.
std::string changed(const std::string& data, std::uint64_t number, const std::function<std::string(const std::string&)>& change) {
    std::string out;
    fields(data, {0, data.size()}, [&](const Field& field) {
        out += field.number == number ? change(text(data, field)) : data.substr(field.whole.at, field.whole.end - field.whole.at);
    });
    return out;
}

// A function that reads a graph, with refusals that name the graph.
template <class Function>
auto reading(const std::string& where, Function function) {
    try {
        return function();
    } catch (const Invalid& error) {
        throw Error(damaged, where + ": not an ONNX graph (" + error.what() + "); rebuild the bundle");
    }
}

}  // namespace

Named<External> external_data(const std::string& data, const std::string& where) {
    Named<External> externals;
    std::vector<Message> path = {model};
    reading(where, [&] {
        tensors(data, path, {0, data.size()}, [&](Span span) {
            auto [name, external] = read_tensor(data, span);
            if (!external) return;
            if (path != std::vector<Message>{model, graph, tensor})
                throw Error(damaged, where + ": " + repr(name) + " reads " + repr(external->location) + " but is no initializer of the graph");
            if (!externals.emplace(name, *external).second)
                throw Error(damaged, where + ": two initializers are named " + repr(name) + "; rebuild the bundle");
        });
    });
    return externals;
}

std::string relocated(const std::string& data, const Named<std::string>& locations, const std::string& where) {
    auto initializer = [&](const std::string& part) {
        auto [name, external] = read_tensor(part, {0, part.size()});
        if (!external || !locations.count(name)) return message(5, part);
        std::string moved = changed(part, 13, [](const std::string&) { return std::string(); });
        for (const auto& [key, value] : {std::pair<std::string, std::string>{"location", locations.at(name)},
                                         {"offset", std::to_string(external->offset)},
                                         {"length", std::to_string(external->length)}})
            moved += message(13, message(1, key) + message(2, value));
        return message(5, moved);
    };
    return reading(where, [&] { return changed(data, 7, [&](const std::string& whole) { return message(7, changed(whole, 5, initializer)); }); });
}

std::string with_inputs(const std::string& data, const std::string& where) {
    auto graph = [](const std::string& whole) {
        std::string inputs;
        auto taken = [&](const std::string& part) {
            auto [name, external] = read_tensor(part, {0, part.size()});
            if (!external) return message(5, part);
            std::uint64_t kind = 0;
            for (const auto& [number, dtype] : KINDS)
                if (dtype == external->dtype) kind = static_cast<std::uint64_t>(number);
            std::string shape;
            for (auto size : external->shape) shape += message(1, written(1 << 3) + written(static_cast<std::uint64_t>(size)));
            inputs += message(11, message(1, name) + message(2, message(1, written(1 << 3) + written(kind) + message(2, shape))));
            return std::string();
        };
        std::string rest = changed(whole, 5, taken);
        return message(7, rest + inputs);
    };
    return reading(where, [&] { return changed(data, 7, graph); });
}

}  // namespace tw
