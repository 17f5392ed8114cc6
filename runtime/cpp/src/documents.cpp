#include "documents.hpp"

#include <cmath>

#include "limits.hpp"

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

// A field of a record, and the function that reads it into one.
struct Field {
    const char* name;
    bool required;
    void (*read)(const Json&, const std::string&, void* record);
};

void read_fields(const Json& v, const std::string& where, void* out, const std::vector<Field>& fields) {
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
}

template <class T>
void check_limits(const T& record, const std::string& where) {
    try {
        limits(record);
    } catch (const Invalid& error) {
        throw Error(damaged, where + ": " + error.what());
    }
}

// ---- records

void no_limits(const Signature&, const std::string&) {}
void no_limits(const TensorFile&, const std::string&) {}
void no_limits(const Call&, const std::string&) {}
void no_limits(const Pass&, const std::string&) {}
void no_limits(const Folder&, const std::string&) {}
void no_limits(const Weights&, const std::string&) {}

#define AS(T, name, required, call) \
    {name, required, [](const Json& v, const std::string& w, void* record) { \
         auto& out = *static_cast<T*>(record); \
         call; \
     }}
#define NEED(T, member) AS(T, #member, true, read(v, w, out.member))
#define MAY(T, member) AS(T, #member, false, read(v, w, out.member))
#define RECORD(T, check, ...) \
    void read(const Json& v, const std::string& where, T& out) { \
        static const std::vector<Field> fields = {__VA_ARGS__}; \
        read_fields(v, where, &out, fields); \
        check(out, where); \
    }

RECORD(TensorSpec, check_limits, NEED(TensorSpec, dtype), NEED(TensorSpec, shape))
RECORD(Signature, no_limits, NEED(Signature, inputs), NEED(Signature, outputs))
RECORD(Grid, check_limits, NEED(Grid, px), NEED(Grid, channels), MAY(Grid, init))
RECORD(State, check_limits, NEED(State, shape), MAY(State, init))
RECORD(Input, check_limits, NEED(Input, dtype), MAY(Input, shape), AS(Input, "default", false, read_default(v, w, out.standard)),
       AS(Input, "choices", false, read_choices(v, w, out)), MAY(Input, help), AS(Input, "least", false, read_bound(v, w, out.least)),
       AS(Input, "most", false, read_bound(v, w, out.most)))
RECORD(Text, check_limits, NEED(Text, ids), AS(Text, "default", false, read(v, w, out.standard)), MAY(Text, help))
RECORD(TensorFile, no_limits, NEED(TensorFile, tensors), MAY(TensorFile, help))
RECORD(Tiles, check_limits, NEED(Tiles, px), NEED(Tiles, overlap_px), MAY(Tiles, whole_up_to_px), MAY(Tiles, batch), MAY(Tiles, fixed_px))
RECORD(Steps, check_limits, NEED(Steps, schedule), NEED(Steps, count), MAY(Steps, px_per_token), MAY(Steps, options))
RECORD(Call, no_limits, NEED(Call, run), NEED(Call, inputs), NEED(Call, outputs))
RECORD(Pass, no_limits, NEED(Pass, name), MAY(Pass, tiles), MAY(Pass, steps), MAY(Pass, state), MAY(Pass, once), MAY(Pass, each), MAY(Pass, last))
RECORD(Program, check_limits, NEED(Program, scale), NEED(Program, multiple_px), NEED(Program, grids), NEED(Program, passes),
       MAY(Program, inputs), MAY(Program, texts), MAY(Program, files), MAY(Program, any_scale))
RECORD(File, check_limits, NEED(File, size), NEED(File, sha256))
RECORD(Memory, check_limits, MAY(Memory, fixed), MAY(Memory, per_tile), MAY(Memory, per_px), MAY(Memory, per_px2), MAY(Memory, copied))
RECORD(Needs, check_limits, MAY(Needs, instructions), MAY(Needs, compute_capability), MAY(Needs, packages), MAY(Needs, cores), MAY(Needs, exactly))
RECORD(Range, check_limits, NEED(Range, least), NEED(Range, most))
RECORD(Profile, check_limits, MAY(Profile, batch), MAY(Profile, side_px))
RECORD(Form, check_limits, NEED(Form, inputs), MAY(Form, convolutions), MAY(Form, rest))
RECORD(EngineSpec, check_limits, NEED(EngineSpec, name), NEED(EngineSpec, backend), NEED(EngineSpec, device), NEED(EngineSpec, precision),
       NEED(EngineSpec, files), MAY(EngineSpec, needs), MAY(EngineSpec, profile), MAY(EngineSpec, memory), MAY(EngineSpec, weights),
       MAY(EngineSpec, form))
RECORD(Component, check_limits, NEED(Component, graph), NEED(Component, inputs), NEED(Component, outputs), NEED(Component, engines), MAY(Component, px))
RECORD(Argument, check_limits, NEED(Argument, kind), MAY(Argument, help), AS(Argument, "default", false, read_default(v, w, out.standard)),
       MAY(Argument, choices), AS(Argument, "least", false, read_bound(v, w, out.least)),
       AS(Argument, "most", false, read_bound(v, w, out.most)), MAY(Argument, needed))
RECORD(Manifest, check_limits, NEED(Manifest, schema_version), NEED(Manifest, system), NEED(Manifest, preset), NEED(Manifest, licence),
       NEED(Manifest, components), NEED(Manifest, files), NEED(Manifest, made_with), MAY(Manifest, options), MAY(Manifest, arguments),
       MAY(Manifest, program), MAY(Manifest, weights), MAY(Manifest, constants), MAY(Manifest, tokenizers))
RECORD(Reference, check_limits, NEED(Reference, file), NEED(Reference, dtype), NEED(Reference, shape), NEED(Reference, offset),
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
