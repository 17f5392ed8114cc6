#include "documents.hpp"

#include <algorithm>
#include <cmath>

namespace tw {

const std::map<std::string, Strings> SCHEDULE_TABLES = {
    {"flow_shift", {"sigma", "sigma_next"}},
    {"ddim", {"t", "alpha", "beta", "alpha_next", "beta_next"}},
    {"ddpm", {"t", "alpha", "beta", "x0_weight", "z_weight", "noise_weight"}},
};
const Strings DTYPES = {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
                        "int64",   "int32",   "int16",   "int8",     "uint8",         "bool"};
const Strings PRECISIONS = {"float32", "bfloat16", "float16", "fp8", "int8"};

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

// ---- reading values

[[noreturn]] void unexpected(const std::string& expected, const Json& value, const std::string& where) {
    std::string shown = value.dump();
    if (shown.size() > 60) shown = shown.substr(0, 57) + "...";
    throw Error(damaged, where + ": expected " + expected + ", found " + shown);
}

void expect(bool fits, const std::string& expected, const Json& value, const std::string& where) {
    if (!fits) unexpected(expected, value, where);
}

void read(const Json& v, const std::string& where, std::string& out) {
    expect(v.kind == Json::string, "string", v, where);
    out = v.text;
}

void read(const Json& v, const std::string& where, bool& out) {
    expect(v.kind == Json::boolean, "boolean", v, where);
    out = v.truth;
}

void read(const Json& v, const std::string& where, std::int64_t& out) {
    expect(v.kind == Json::integer, "integer", v, where);
    expect(!v.huge, "an integer of 64 bits", v, where);
    out = v.whole;
}

void read(const Json& v, const std::string& where, double& out) {
    bool fits = (v.kind == Json::integer || v.kind == Json::number) && std::isfinite(v.real);
    expect(fits, "a finite number", v, where);
    out = v.real;
}

void read(const Json& v, const std::string& where, Dim& out) {
    expect(v.kind == Json::integer || v.kind == Json::string, "integer or string", v, where);
    if (v.kind == Json::string) {
        out.name = v.text;
        if (v.text.empty()) unexpected("integer or string", v, where);
    } else {
        read(v, where, out.size);
    }
}

struct Numbers {
    bool text, nothing;
};

Scalar scalar(const Json& v, const std::string& where, Numbers allowed) {
    Scalar out;
    if (v.kind == Json::null && allowed.nothing) return out;
    std::string expected = std::string("integer or number") + (allowed.text ? " or string" : "") + (allowed.nothing ? " or null" : "");
    if (v.kind == Json::string && allowed.text) {
        out.kind = Scalar::words;
        out.text = v.text;
        return out;
    }
    expect(v.kind == Json::integer || v.kind == Json::number, expected, v, where);
    out.number = v.real;
    if (v.kind == Json::integer) {
        read(v, where, out.integer);
        out.kind = Scalar::whole;
    } else {
        expect(std::isfinite(v.real), expected, v, where);
        out.kind = Scalar::real;
    }
    return out;
}

void read_bound(const Json& v, const std::string& where, Scalar& out) { out = scalar(v, where, {false, true}); }
void read_default(const Json& v, const std::string& where, Scalar& out) { out = scalar(v, where, {true, true}); }
void read(const Json& v, const std::string& where, Scalar& out) { out = scalar(v, where, {true, false}); }

// All readers of records are declared before the templates that use them.
#define RECORDS(X)                                                                                                    \
    X(TensorSpec) X(Signature) X(Grid) X(State) X(Input) X(Text) X(TensorFile) X(Tiles) X(Steps) X(Call) X(Pass)       \
    X(Program) X(File) X(Memory) X(Needs) X(Range) X(Profile) X(Form) X(EngineSpec) X(Component) X(Argument)           \
    X(Manifest) X(Reference) X(Folder) X(Weights)
#define DECLARE(T) void read(const Json& v, const std::string& where, T& out);
RECORDS(DECLARE)
#undef DECLARE

template <class T>
void read(const Json& v, const std::string& where, std::vector<T>& out) {
    expect(v.kind == Json::list, "a list", v, where);
    out.resize(v.items.size());
    for (std::size_t i = 0; i < out.size(); ++i) read(v.items[i], where + "[" + std::to_string(i) + "]", out[i]);
}

template <class T, std::size_t N>
void read(const Json& v, const std::string& where, std::array<T, N>& out) {
    expect(v.kind == Json::list, "a list", v, where);
    expect(v.items.size() == N, "a list of " + std::to_string(N), v, where);
    for (std::size_t i = 0; i < N; ++i) read(v.items[i], where + "[" + std::to_string(i) + "]", out[i]);
}

template <class T>
void read(const Json& v, const std::string& where, Named<T>& out) {
    expect(v.kind == Json::object, "an object", v, where);
    out.clear();
    for (const auto& [key, value] : v.members) read(value, where + "." + key, out[key]);
}

template <class T>
void read(const Json& v, const std::string& where, std::optional<T>& out) {
    if (v.kind == Json::null) {
        out.reset();
    } else {
        read(v, where, out.emplace());
    }
}

void read_choices(const Json& v, const std::string& where, Input& out) {
    read(v, where, out.choices);
    out.order.clear();
    for (const auto& [name, value] : v.members) out.order.push_back(name);
}

template <class T>
struct Field {
    const char* name;
    bool required;
    void (*read)(const Json&, const std::string&, T&);
};

template <class T>
void record(const Json& v, const std::string& where, T& out, std::initializer_list<Field<T>> fields, void (*limits)(const T&)) {
    expect(v.kind == Json::object, "an object", v, where);
    std::set<std::string> known, unknown;
    for (const auto& field : fields) known.insert(field.name);
    for (const auto& [key, value] : v.members)
        if (!known.count(key)) unknown.insert(key);
    if (!unknown.empty())
        throw Error(damaged, where + ": unknown key " + repr(*unknown.begin()) + "; known are " + join(listed(known)));
    for (const auto& field : fields)
        if (field.required && !v.find(field.name))
            throw Error(damaged, where + ": key " + repr(std::string(field.name)) + " is missing; rebuild the bundle");
    for (const auto& field : fields)
        if (const Json* value = v.find(field.name)) field.read(*value, where + "." + field.name, out);
    try {
        limits(out);
    } catch (const Invalid& error) {
        throw Error(damaged, where + ": " + error.what());
    }
}

// ---- limits, in the words of check_limits

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

void no_limits(const Signature&) {}
void no_limits(const TensorFile&) {}
void no_limits(const Call&) {}
void no_limits(const Pass&) {}
void no_limits(const Folder&) {}
void no_limits(const Weights&) {}

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

// ---- records

#define NEED(T, member) {#member, true, [](const Json& v, const std::string& w, T& out) { read(v, w, out.member); }}
#define MAY(T, member) {#member, false, [](const Json& v, const std::string& w, T& out) { read(v, w, out.member); }}
#define AS(T, name, required, call) {name, required, [](const Json& v, const std::string& w, T& out) { call; }}
#define RECORD(T, check, ...) \
    void read(const Json& v, const std::string& where, T& out) { record<T>(v, where, out, {__VA_ARGS__}, check); }

RECORD(TensorSpec, limits, NEED(TensorSpec, dtype), NEED(TensorSpec, shape))
RECORD(Signature, no_limits, NEED(Signature, inputs), NEED(Signature, outputs))
RECORD(Grid, limits, NEED(Grid, px), NEED(Grid, channels), MAY(Grid, init))
RECORD(State, limits, NEED(State, shape), MAY(State, init))
RECORD(Input, limits, NEED(Input, dtype), MAY(Input, shape), AS(Input, "default", false, read_default(v, w, out.standard)),
       AS(Input, "choices", false, read_choices(v, w, out)), MAY(Input, help), AS(Input, "least", false, read_bound(v, w, out.least)),
       AS(Input, "most", false, read_bound(v, w, out.most)))
RECORD(Text, limits, NEED(Text, ids), AS(Text, "default", false, read(v, w, out.standard)), MAY(Text, help))
RECORD(TensorFile, no_limits, NEED(TensorFile, tensors), MAY(TensorFile, help))
RECORD(Tiles, limits, NEED(Tiles, px), NEED(Tiles, overlap_px), MAY(Tiles, whole_up_to_px), MAY(Tiles, batch), MAY(Tiles, fixed_px))
RECORD(Steps, limits, NEED(Steps, schedule), NEED(Steps, count), MAY(Steps, px_per_token), MAY(Steps, options))
RECORD(Call, no_limits, NEED(Call, run), NEED(Call, inputs), NEED(Call, outputs))
RECORD(Pass, no_limits, NEED(Pass, name), MAY(Pass, tiles), MAY(Pass, steps), MAY(Pass, state), MAY(Pass, once), MAY(Pass, each), MAY(Pass, last))
RECORD(Program, limits, NEED(Program, scale), NEED(Program, multiple_px), NEED(Program, grids), NEED(Program, passes),
       MAY(Program, inputs), MAY(Program, texts), MAY(Program, files), MAY(Program, any_scale))
RECORD(File, limits, NEED(File, size), NEED(File, sha256))
RECORD(Memory, limits, MAY(Memory, fixed), MAY(Memory, per_tile), MAY(Memory, per_px), MAY(Memory, per_px2), MAY(Memory, copied))
RECORD(Needs, limits, MAY(Needs, instructions), MAY(Needs, compute_capability), MAY(Needs, packages), MAY(Needs, cores), MAY(Needs, exactly))
RECORD(Range, limits, NEED(Range, least), NEED(Range, most))
RECORD(Profile, limits, MAY(Profile, batch), MAY(Profile, side_px))
RECORD(Form, limits, NEED(Form, inputs), MAY(Form, convolutions), MAY(Form, rest))
RECORD(EngineSpec, limits, NEED(EngineSpec, name), NEED(EngineSpec, backend), NEED(EngineSpec, device), NEED(EngineSpec, precision),
       NEED(EngineSpec, files), MAY(EngineSpec, needs), MAY(EngineSpec, profile), MAY(EngineSpec, memory), MAY(EngineSpec, weights),
       MAY(EngineSpec, form))
RECORD(Component, limits, NEED(Component, graph), NEED(Component, inputs), NEED(Component, outputs), NEED(Component, engines), MAY(Component, px))
RECORD(Argument, limits, NEED(Argument, kind), MAY(Argument, help), AS(Argument, "default", false, read_default(v, w, out.standard)),
       MAY(Argument, choices), AS(Argument, "least", false, read_bound(v, w, out.least)),
       AS(Argument, "most", false, read_bound(v, w, out.most)), MAY(Argument, needed))
RECORD(Manifest, limits, NEED(Manifest, schema_version), NEED(Manifest, system), NEED(Manifest, preset), NEED(Manifest, licence),
       NEED(Manifest, components), NEED(Manifest, files), NEED(Manifest, made_with), MAY(Manifest, options), MAY(Manifest, arguments),
       MAY(Manifest, program), MAY(Manifest, weights), MAY(Manifest, constants), MAY(Manifest, tokenizers))
RECORD(Reference, limits, NEED(Reference, file), NEED(Reference, dtype), NEED(Reference, shape), NEED(Reference, offset),
       NEED(Reference, length), MAY(Reference, folder))
RECORD(Folder, no_limits, NEED(Folder, path), NEED(Folder, files))
RECORD(Weights, no_limits, NEED(Weights, folders), NEED(Weights, tensors))

template <class T>
T document(const Json& value, const std::string& where) {
    try {
        T out;
        read(value, where, out);
        return out;
    } catch (const Error& error) {
        throw Error(error.code, one_line(error.what()));
    }
}

}  // namespace

Manifest read_manifest(const Json& value, const std::string& where) {
    const Json* version = value.kind == Json::object ? value.find("schema_version") : nullptr;
    if (version && version->kind == Json::integer && version->real > 2)
        throw Error(damaged, where + ": schema " + version->text + ", this version reads up to 2; upgrade tilewright");
    if (version && version->kind == Json::integer && version->real < 2)
        throw Error(damaged, where + ": schema " + version->text + " is too old, this version reads 2; build the bundle again");
    auto manifest = document<Manifest>(value, where);
    if (manifest.components.empty()) throw Error(damaged, where + ": holds no component; rebuild the bundle");
    return manifest;
}

Program read_program(const Json& value, const std::string& where) { return document<Program>(value, where); }
Weights read_weights(const Json& value, const std::string& where) { return document<Weights>(value, where); }
Signature read_signature(const Json& value, const std::string& where) { return document<Signature>(value, where); }
TensorSpec read_tensor_spec(const Json& value, const std::string& where) { return document<TensorSpec>(value, where); }

}  // namespace tw
