#include "limits.hpp"

#include <algorithm>

namespace tw {
namespace {

const Strings DIFFUSION_OPTIONS = {"betas", "beta_start", "beta_end", "spacing_offset", "final_alpha"};
const std::map<std::string, std::string> OPTION_KINDS = {
    {"base_shift", "float"}, {"max_shift", "float"}, {"base_tokens", "int"}, {"max_tokens", "int"},
    {"min_mu", "float"},     {"max_mu", "float"},    {"betas", "str"},       {"beta_start", "float"},
    {"beta_end", "float"},   {"spacing_offset", "int"}, {"final_alpha", "str"},
};
const std::map<std::string, Strings> SCHEDULE_OPTIONS = {
    {"flow_shift", {"base_shift", "max_shift", "base_tokens", "max_tokens", "min_mu", "max_mu"}},
    {"ddim", DIFFUSION_OPTIONS},
    {"ddpm", DIFFUSION_OPTIONS},
};

bool among(const Strings& names, const std::string& name) { return std::find(names.begin(), names.end(), name) != names.end(); }

void in_enum(const char* field, const std::string& value, const Strings& choices) {
    if (!among(choices, value)) throw Invalid(std::string(field) + " " + repr(value) + " is not one of " + join(choices));
}

// Whether a text is words of these letters, with single separators between them.
template <class Letter>
bool is_words(const std::string& text, Letter letter, const std::string& separators) {
    bool inside = false;
    for (char c : text) {
        bool separates = separators.find(c) != std::string::npos;
        if (!letter(c) && !(separates && inside)) return false;
        inside = !separates;
    }
    return inside;
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_small(char c) { return (c >= 'a' && c <= 'z') || is_digit(c); }

void in_pattern(const char* field, const std::string& value) {
    if (!is_words(value, is_small, "-_."))
        throw Invalid(std::string(field) + " " + repr(value) + " does not match ^[a-z0-9]+([-_.][a-z0-9]+)*$");
}

// "h/8" or "w/8"
bool is_part_of_side(const std::string& name) {
    bool begins = name.size() >= 3 && name.size() <= 6 && (name[0] == 'h' || name[0] == 'w') && name[1] == '/' && name[2] != '0';
    return begins && is_words(name.substr(2), is_digit, "");
}

void at_least(const char* field, std::int64_t value, std::int64_t least) {
    if (value < least) throw Invalid(std::string(field) + " " + std::to_string(value) + " must be at least " + std::to_string(least));
}

void between(const char* field, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value < least || value > most)
        throw Invalid(std::string(field) + " " + std::to_string(value) + " must lie in " + std::to_string(least) + ".." + std::to_string(most));
}

constexpr std::int64_t MOST_BYTES = INT64_MAX;

void bytes(const char* field, double value) {
    if (value < 0 || value > static_cast<double>(MOST_BYTES))
        throw Invalid(std::string(field) + " " + repr(value) + " must lie in 0.." + std::to_string(MOST_BYTES));
}

}  // namespace

void limits(const TensorSpec& spec) {
    in_enum("dtype", spec.dtype, DTYPES);
    for (const auto& dim : spec.shape)
        if (!dim.named() && dim.size < 1) throw Invalid("shape " + repr(spec.shape) + " holds a size below 1");
}

void limits(const Grid& grid) {
    at_least("px", grid.px, 1);
    at_least("channels", grid.channels, 1);
    in_enum("init", grid.init, {"input", "noise", "zeros", "none"});
}

void limits(const State& state) {
    in_enum("init", state.init, {"zeros", "ones", "noise"});
    if (state.init == "noise" && state.shape.size() != 3)
        throw Invalid("noise needs a shape of channels, rows, columns, not " + repr(state.shape));
    for (const auto& dim : state.shape) {
        bool fits = dim.named() ? is_part_of_side(dim.name) : dim.size > 0;
        std::string shown = dim.named() ? repr(dim.name) : std::to_string(dim.size);
        if (!fits) throw Invalid("shape " + repr(state.shape) + ": " + shown + " is neither a size nor like 'h/8' or 'w/8'");
    }
}

void limits(const Input& input) {
    for (auto size : input.shape)
        if (size < 1) throw Invalid("shape " + repr(input.shape) + " holds a size below 1");
}

void limits(const Text& text) {
    if (text.ids.empty()) throw Invalid("a text needs at least one input for its ids");
}

void limits(const Tiles& tiles) {
    at_least("px", tiles.px, 1);
    at_least("overlap_px", tiles.overlap_px, 0);
    at_least("batch", tiles.batch, 1);
    bool listed = std::find(tiles.fixed_px.begin(), tiles.fixed_px.end(), tiles.px) != tiles.fixed_px.end();
    if (!tiles.fixed_px.empty() && (!listed || tiles.whole_up_to_px))
        throw Invalid("px " + std::to_string(tiles.px) + " must be among fixed_px " + repr(tiles.fixed_px) + ", and no image be taken whole");
    if (tiles.overlap_px > tiles.px / 2)
        throw Invalid("overlap_px " + std::to_string(tiles.overlap_px) + " must lie between 0 and half of px " + std::to_string(tiles.px));
}

void limits(const Steps& steps) {
    in_enum("schedule", steps.schedule, {"flow_shift", "ddim", "ddpm"});
    between("count", steps.count, 1, 1000);
    at_least("px_per_token", steps.px_per_token, 1);
    const std::string schedule = "schedule " + repr(steps.schedule);
    const Strings& known = SCHEDULE_OPTIONS.at(steps.schedule);
    for (const auto& [name, value] : steps.options)
        if (!among(known, name)) throw Invalid(schedule + " has no option " + repr(name));
    Strings needed = steps.schedule == "flow_shift" ? Strings{} : known;
    std::sort(needed.begin(), needed.end());
    for (const auto& name : needed)
        if (!steps.options.count(name)) throw Invalid(schedule + " needs the option " + repr(name));
    for (const auto& [name, value] : steps.options) {
        const std::string& kind = OPTION_KINDS.at(name);
        bool fits = kind == "str" ? value.kind == Scalar::words : value.kind == Scalar::whole || (kind == "float" && value.kind == Scalar::real);
        if (!fits) throw Invalid(schedule + ": option " + repr(name) + " is no " + kind + ": " + value.repr());
    }
}

void limits(const Program& program) {
    between("scale", program.scale, 1, 16);
    between("multiple_px", program.multiple_px, 1, 4096);
}

void limits(const File& file) { at_least("size", file.size, 0); }

void limits(const Memory& memory) {
    bytes("fixed", memory.fixed);
    bytes("per_tile", memory.per_tile);
    bytes("per_px", memory.per_px);
    bytes("per_px2", memory.per_px2);
    between("copied", memory.copied, 0, MOST_BYTES);
}

void limits(const Needs& needs) {
    at_least("cores", needs.cores, 1);
    for (const auto& [package, least] : needs.packages)
        if (!is_words(least, is_digit, ".")) throw Invalid("least version " + repr(least) + " of " + repr(package) + " is not like 1.22");
}

void limits(const Range& range) {
    at_least("least", range.least, 1);
    at_least("most", range.most, 1);
    if (range.least > range.most)
        throw Invalid("least " + std::to_string(range.least) + " must not exceed most " + std::to_string(range.most));
}

void limits(const Profile& profile) {
    if (profile.batch.least != 1) throw Invalid("batch.least " + std::to_string(profile.batch.least) + " must be 1");
}

void limits(const Form& form) {
    in_enum("inputs", form.inputs, {"int8", "uint8", "float8_e4m3fn"});
    in_enum("rest", form.rest, {"float32", "bfloat16"});
}

void limits(const EngineSpec& engine) {
    in_pattern("name", engine.name);
    in_pattern("backend", engine.backend);
    in_enum("device", engine.device, {"cpu", "cuda"});
    in_enum("precision", engine.precision, PRECISIONS);
    if (engine.files.empty()) throw Invalid("files must have at least 1");
}

void limits(const Component& component) {
    if (component.engines.empty()) throw Invalid("engines must have at least 1");
    std::set<std::string> names, twice;
    for (const auto& engine : component.engines)
        if (!names.insert(engine.name).second) twice.insert(engine.name);
    if (!twice.empty()) throw Invalid("engine " + repr(*twice.begin()) + " is listed twice");
}

void limits(const Argument& argument) { in_enum("kind", argument.kind, {"words", "tensors", "number", "integer", "choice"}); }

void limits(const Manifest& manifest) {
    if (manifest.schema_version != 2) throw Invalid("schema_version " + std::to_string(manifest.schema_version) + " is not one of 2");
}

void limits(const Reference& reference) {
    at_least("offset", reference.offset, 0);
    at_least("length", reference.length, 0);
}

}  // namespace tw
