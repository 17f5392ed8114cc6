// What the records of a bundle's documents know of themselves.
#include <algorithm>

#include "documents.hpp"

namespace tw {

bool Scalar::operator==(const Scalar& other) const {
    if ((kind == whole || kind == real) && (other.kind == whole || other.kind == real)) return number == other.number;
    return kind == other.kind && text == other.text;
}

std::string Scalar::repr() const {
    switch (kind) {
        case none: return "None";
        case whole: return std::to_string(integer);
        case real: return tw::repr(number);
        default: return tw::repr(text);
    }
}

std::string repr(const Dims& shape) {
    Strings parts;
    for (const auto& dim : shape) parts.push_back(dim.named() ? repr(dim.name) : std::to_string(dim.size));
    return "[" + join(parts) + "]";
}

TensorSpec TensorSpec::rows(const Dim& count) const {
    TensorSpec spec = *this;
    spec.shape[0] = count;
    return spec;
}

Shape State::of_tile(std::int64_t height, std::int64_t width) const {
    Shape sizes;
    for (const auto& dim : shape)
        sizes.push_back(dim.named() ? (dim.name[0] == 'h' ? height : width) / std::stoll(dim.name.substr(2)) : dim.size);
    return sizes;
}

TensorSpec Input::spec() const {
    TensorSpec out{dtype, {}};
    for (auto size : shape) out.shape.push_back({size, ""});
    if (out.shape.empty()) out.shape.push_back({1, ""});
    return out;
}

bool Tiles::operator==(const Tiles& o) const {
    return px == o.px && overlap_px == o.overlap_px && whole_up_to_px == o.whole_up_to_px && batch == o.batch && fixed_px == o.fixed_px;
}

bool Call::shared(const std::set<std::string>& of_tiles) const {
    for (const auto& [name, source] : inputs) {
        bool elsewhere = !source.empty() && (source[0] == '#' || source[0] == '$' || source[0] == '@');
        if (!elsewhere && (source[0] == '~' || of_tiles.count(source))) return false;
    }
    for (const auto& [name, target] : outputs)
        if (of_tiles.count(target)) return false;
    return true;
}

std::vector<Pass::Placed> Pass::calls() const {
    std::vector<Placed> all;
    for (auto [section, calls] : {std::pair{"once", &once}, {"each", &each}, {"last", &last}})
        for (std::size_t i = 0; i < calls->size(); ++i) all.push_back({section, i, &(*calls)[i]});
    return all;
}

std::set<std::string> Pass::reads() const {
    std::set<std::string> names;
    for (const auto& placed : calls())
        for (const auto& [name, source] : placed.call->inputs) names.insert(source.substr(std::min(source.find_first_not_of("@#"), source.size())));
    return names;
}

std::set<std::string> Pass::writes(const char* section) const {
    std::set<std::string> names;
    for (const auto& placed : calls())
        if (!section || std::string(section) == placed.section)
            for (const auto& [name, target] : placed.call->outputs) names.insert(target);
    return names;
}

std::set<std::string> Program::components() const {
    std::set<std::string> names;
    for (const auto& p : passes)
        for (const auto& placed : p.calls()) names.insert(placed.call->run);
    return names;
}

std::set<std::string> Program::untiled_values() const {
    std::set<std::string> names;
    for (const auto& p : passes)
        if (!p.tiles)
            for (const auto& name : p.writes())
                if (!grids.count(name)) names.insert(name);
    return names;
}

bool Argument::operator==(const Argument& o) const {
    return kind == o.kind && help == o.help && standard == o.standard && choices == o.choices && least == o.least && most == o.most &&
           needed == o.needed;
}

Strings Manifest::named_files() const {
    Strings names;
    for (const auto& [name, component] : components) {
        names.push_back(component.graph);
        for (const auto& engine : component.engines) names.insert(names.end(), engine.files.begin(), engine.files.end());
    }
    names.push_back(program);
    names.push_back(weights);
    if (constants) names.push_back(*constants);
    names.insert(names.end(), tokenizers.begin(), tokenizers.end());
    return names;
}

}  // namespace tw
