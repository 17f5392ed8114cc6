// The documents of a bundle: manifest, program, weights. docs/bundle.md and docs/program.md say what they mean.
#pragma once

#include <array>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base.hpp"
#include "json.hpp"

namespace tw {

template <class T>
using Named = std::map<std::string, T>;

// A number, a text, or nothing.
struct Scalar {
    enum Kind { none, whole, real, words };
    Kind kind = none;
    std::int64_t integer = 0;
    double number = 0;  // of an integer too
    std::string text;

    bool operator==(const Scalar& other) const;
    std::string repr() const;
};

// A size, or the name of one.
struct Dim {
    std::int64_t size = 0;
    std::string name;  // empty: a size

    bool named() const { return !name.empty(); }
    bool operator==(const Dim& other) const { return size == other.size && name == other.name; }
    bool operator!=(const Dim& other) const { return !(*this == other); }
};

using Dims = std::vector<Dim>;
std::string repr(const Dims& shape);

struct TensorSpec {
    std::string dtype;
    Dims shape;

    TensorSpec rows(const Dim& count) const;
    bool operator==(const TensorSpec& other) const { return dtype == other.dtype && shape == other.shape; }
};

struct Signature {
    Named<TensorSpec> inputs, outputs;
};

// ---- the program

struct Grid {
    std::int64_t px = 0, channels = 0;
    std::string init = "none";
};

struct State {
    Dims shape;
    std::string init = "zeros";

    Shape of_tile(std::int64_t height, std::int64_t width) const;
};

struct Input {
    std::string dtype;
    Shape shape;
    Scalar standard;  // the default
    Named<std::int64_t> choices;
    Strings order;  // of the choices in the document
    std::string help;
    Scalar least, most;

    TensorSpec spec() const;
};

struct Text {
    Named<std::string> ids;
    std::optional<std::string> standard;
    std::string help;
};

struct TensorFile {
    Named<std::string> tensors;
    std::string help;
};

struct Tiles {
    std::int64_t px = 0, overlap_px = 0;
    std::optional<std::array<std::int64_t, 2>> whole_up_to_px;
    std::int64_t batch = 1;
    Shape fixed_px;

    bool operator==(const Tiles& other) const;
};

struct Steps {
    std::string schedule;
    std::int64_t count = 0, px_per_token = 256;
    Named<Scalar> options;
};

struct Call {
    std::string run;
    Named<std::string> inputs, outputs;

    // Whether it reads and writes nothing that belongs to a tile or a grid.
    bool shared(const std::set<std::string>& of_tiles) const;
};

struct Pass {
    std::string name;
    std::optional<Tiles> tiles;
    std::optional<Steps> steps;
    Named<State> state;
    std::vector<Call> once, each, last;

    struct Placed {
        const char* section;
        std::size_t position;
        const Call* call;
    };
    std::vector<Placed> calls() const;
    std::set<std::string> reads() const;
    std::set<std::string> writes(const char* section = nullptr) const;
};

struct Program {
    std::int64_t scale = 0, multiple_px = 0;
    Named<Grid> grids;
    std::vector<Pass> passes;
    Named<Input> inputs;
    Named<Text> texts;
    Named<TensorFile> files;
    bool any_scale = false;

    std::set<std::string> components() const;
    std::set<std::string> untiled_values() const;  // which a caller may give instead of computing them
};

// ---- the manifest

struct File {
    std::int64_t size = 0;
    std::string sha256;
};

struct Memory {
    double fixed = 0, per_tile = 0, per_px = 0, per_px2 = 0;
    std::int64_t copied = 0;
};

struct Needs {
    Strings instructions;
    std::optional<std::array<std::int64_t, 2>> compute_capability;
    Named<std::string> packages;
    std::int64_t cores = 1;
    bool exactly = false;
};

struct Range {
    std::int64_t least = 1, most = 1;
};

struct Profile {
    Range batch{1, 32}, side_px{1, 1 << 20};
};

struct Form {
    std::string inputs;
    bool convolutions = true;
    std::string rest = "float32";
};

struct EngineSpec {
    std::string name, backend, device, precision;
    Strings files;  // the first is the graph
    Needs needs;
    Profile profile;
    Memory memory;
    std::optional<std::string> weights;
    std::optional<Form> form;
};

struct Component {
    std::string graph;
    Named<TensorSpec> inputs, outputs;
    std::vector<EngineSpec> engines;
    Named<std::int64_t> px;
};

struct Argument {
    std::string kind, help;
    Scalar standard;
    Strings choices;
    Scalar least, most;
    bool needed = false;

    bool operator==(const Argument& other) const;
    std::string takes() const;
};

struct Manifest {
    std::int64_t schema_version = 0;
    std::string system, preset, licence;
    Named<Component> components;
    Named<File> files;
    Named<std::string> made_with, options;
    Named<Argument> arguments;
    std::string program = "program.json", weights = "weights.json";
    std::optional<std::string> constants;
    Strings tokenizers;

    Strings named_files() const;
};

// ---- the weights

struct Reference {
    std::string file, dtype;
    Shape shape;
    std::int64_t offset = 0, length = 0;
    std::string folder;

    std::string location() const { return "weights/" + folder + "/" + file; }
};

struct Folder {
    std::optional<std::string> path;
    Named<File> files;
};

struct Weights {
    Named<Folder> folders;
    Named<Named<Reference>> tensors;
};

// Each throws Error(damaged) in one line that begins with `where`.
Manifest read_manifest(const Json& document, const std::string& where);
Program read_program(const Json& document, const std::string& where);
Weights read_weights(const Json& document, const std::string& where);
Signature read_signature(const Json& document, const std::string& where);
TensorSpec read_tensor_spec(const Json& document, const std::string& where);

// The arguments that a caller may set. They follow from the program.
Named<Argument> arguments_of(const Program& program);
Argument argument_of(const Input& input);
void check_arguments(const Program& program);  // refuses names that callers cannot use, and ranges that make no sense

// Refuses a program that cannot run on these components. Nothing is run.
void check_program(const Program& program, const Named<Signature>& components, const Named<TensorSpec>& constants);

extern const std::map<std::string, Strings> SCHEDULE_TABLES;
extern const Strings DTYPES, PRECISIONS;
inline bool is_float(const std::string& dtype) { return dtype.find("float") != std::string::npos; }

}  // namespace tw
