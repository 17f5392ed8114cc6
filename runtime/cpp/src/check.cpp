// Checking that a program can run on its components: names, scopes, shapes and types. As runtime/bundle/check.py.
#include <algorithm>

#include "documents.hpp"

namespace tw {
namespace {

[[noreturn]] void refuse(const std::string& complaint) { throw Error(damaged, complaint); }

const std::string ANY = "batch_or_1";
const Dim BATCH{0, "batch"}, ONE{1, ""};

template <class T>
const T& look_up(const Named<T>& values, const std::string& name, const std::string& complaint) {
    auto entry = values.find(name);
    if (entry == values.end()) refuse(complaint + "; there are " + (values.empty() ? "none" : join(keys(values))));
    return entry->second;
}

template <class T>
Named<T> merged(Named<T> one, const Named<T>& other) {  // the other one wins
    for (const auto& [name, value] : other) one[name] = value;
    return one;
}

void check_name(const std::string& where, const std::string& name) {
    if (!is_identifier(name)) refuse(where + ": a place is named by letters, digits and underscores");
}

void check_grids(const Program& program) {
    for (auto [name, init] : {std::pair{"image", "input"}, {"result", "none"}}) {
        auto grid = program.grids.find(name);
        bool right = grid != program.grids.end() && grid->second.px == 1 && grid->second.channels == 3 && grid->second.init == init;
        std::string shown = "None";
        if (grid != program.grids.end())
            shown = "Grid(px=" + std::to_string(grid->second.px) + ", channels=" + std::to_string(grid->second.channels) +
                    ", init=" + repr(grid->second.init) + ")";
        if (!right)
            refuse("program: grid " + repr(std::string(name)) + " must be there with px 1, channels 3, init " + init + "; found " + shown);
    }
    for (const auto& [name, grid] : program.grids) {
        const std::string where = "program: grid " + repr(name);
        check_name(where, name);
        if (program.multiple_px % grid.px)
            refuse(where + ": px " + std::to_string(grid.px) + " does not divide multiple_px " + std::to_string(program.multiple_px));
        if (grid.init == "input" && name != "image") refuse(where + ": only 'image' is an input; use init none, zeros or noise");
    }
}

void check_input(const std::string& name, const Input& spec, const Named<TensorSpec>& constants) {
    const std::string where = "program: input " + repr(name);
    const Scalar& standard = spec.standard;
    bool number = standard.kind == Scalar::whole || standard.kind == Scalar::real;
    if (std::find(DTYPES.begin(), DTYPES.end(), spec.dtype) == DTYPES.end())
        refuse(where + ": dtype " + repr(spec.dtype) + " is not one of " + join(DTYPES));
    if (!spec.shape.empty() && spec.shape[0] != 1) refuse(where + ": shape " + repr(spec.shape) + " is not one row; begin it with 1");
    if (standard.kind == Scalar::words) {
        auto constant = standard.text.empty() || standard.text[0] != '#' ? constants.end() : constants.find(standard.text.substr(1));
        if (constant == constants.end() || !(constant->second == spec.spec()))
            refuse(where + ": default " + repr(standard.text) + " is no constant of that type and shape");
    } else if (number && !spec.shape.empty()) {
        refuse(where + ": the number " + standard.repr() + " cannot fill " + repr(spec.shape) + "; name a #constant");
    } else if (standard.kind == Scalar::real && !is_float(spec.dtype)) {
        refuse(where + ": default " + standard.repr() + " is no " + spec.dtype);
    }
    if (spec.choices.empty() || standard.kind == Scalar::none) return;
    for (const auto& [choice, value] : spec.choices)
        if (number && static_cast<double>(value) == standard.number) return;
    Strings choices;
    for (const auto& choice : spec.order) choices.push_back(repr(choice) + ": " + std::to_string(spec.choices.at(choice)));
    refuse(where + ": default " + standard.repr() + " is not among {" + join(choices) + "}");
}

void check_texts(const Program& program) {
    for (const auto& [name, text] : program.texts)
        for (const auto& [target, file] : text.ids) {
            auto spec = program.inputs.find(target);
            bool fits = spec != program.inputs.end() && spec->second.dtype == "int64" && spec->second.shape.size() == 2 && spec->second.shape[0] == 1;
            if (program.inputs.count(name) || !fits)
                refuse("program: text " + repr(name) + ": " + repr(target) + " is no input of int64 ids [1, length]");
        }
}

void fit(const TensorSpec& actual, const TensorSpec& expected, const std::string& where) {
    bool clash = actual.dtype != expected.dtype || actual.shape.size() != expected.shape.size();
    for (std::size_t i = 0; !clash && i < actual.shape.size(); ++i)
        clash = !actual.shape[i].named() && !expected.shape[i].named() && actual.shape[i].size != expected.shape[i].size;
    if (clash)
        refuse(where + ": " + actual.dtype + " " + repr(actual.shape) + " does not fit " + expected.dtype + " " + repr(expected.shape));
}

// Refuses a source that is no row, and an input that has no axis of tiles or cannot take one row for all tiles.
void check_rows(const TensorSpec& actual, const TensorSpec& expected, bool alone, const std::string& where) {
    if (actual.shape.empty() || (actual.shape[0] != BATCH && actual.shape[0] != ONE))
        refuse(where + ": " + repr(actual.shape) + " is not one row; begin it with 1");
    Strings axes = actual.shape[0] == ONE && !alone ? Strings{ANY} : Strings{"batch", ANY};
    bool fits = !expected.shape.empty() && std::find(axes.begin(), axes.end(), expected.shape[0].name) != axes.end();
    if (!fits) refuse(where + ": the input's shape " + repr(expected.shape) + " must begin with " + join(axes, " or "));
}

// The names that exist at a point of a program, with their types and shapes.
class Scope {
   public:
    Scope(const Program& program, const Named<Signature>& components, const Named<TensorSpec>& constants)
        : program_(program), components_(components), constants_(constants) {}

    void enter(const Pass& p) {
        const std::string where = "program: pass " + repr(p.name);
        if (names_.count(p.name)) refuse(where + ": the name is taken; give every pass its own");
        if (!p.each.empty() && !p.steps) refuse(where + ": 'each' needs 'steps'; give a schedule");
        if ((!p.last.empty() || !p.state.empty()) && !p.steps) refuse(where + ": 'last' and 'state' need 'steps'; use 'once'");
        if (p.once.empty() && p.each.empty()) refuse(where + ": makes no call; remove it");
        if (p.tiles && (p.tiles->px % program_.multiple_px || p.tiles->overlap_px % program_.multiple_px))
            refuse(where + ": tiles of " + std::to_string(p.tiles->px) + " px overlapping by " + std::to_string(p.tiles->overlap_px) +
                   " px must be multiples of multiple_px " + std::to_string(program_.multiple_px));
        names_.insert(p.name);
        now_ = &p;
        fresh_.clear();
        joined_ = false;
        for (const auto& name : p.writes("each")) joined_ = joined_ || program_.grids.count(name);
        tile_ = p.tiles ? of_tiles(*p.tiles) : Named<TensorSpec>{};
        for (const auto& [name, state] : p.state) {
            check_state(where, name, state);
            TensorSpec spec{"float32", {BATCH}};
            spec.shape.insert(spec.shape.end(), state.shape.begin(), state.shape.end());
            tile_[name] = spec;
        }
    }

    void leave() {
        written.insert(fresh_.begin(), fresh_.end());
        if (!now_->tiles) {
            for (const auto& [name, spec] : tile_)
                if (!now_->state.count(name)) job[name] = spec;
        } else {
            of_tiles(*now_->tiles) = tile_;
        }
    }

    void call(const std::string& section, const std::string& place, const Call& call) {
        const std::string where = "program: " + place;
        if (!components_.count(call.run)) refuse(where + ": no such component; there are " + join(keys(components_)));
        const Signature& signature = components_.at(call.run);
        for (const auto& [name, spec] : signature.inputs)
            if (!call.inputs.count(name)) refuse(where + ": input " + repr(name) + " is missing");
        for (const auto& [name, source] : call.inputs)
            if (!signature.inputs.count(name)) refuse(where + ": the component has no input " + repr(name));
        for (const auto& [name, target] : call.outputs)
            if (!signature.outputs.count(name)) refuse(where + ": the component has no output " + repr(name));
        std::set<std::string> of_tiles = key_set(tile_), targets;
        for (const auto& [name, grid] : program_.grids) of_tiles.insert(name);
        bool shared = section == "once" && call.shared(of_tiles);
        bool alone = shared || !now_->tiles;
        for (const auto& [name, target] : call.outputs) targets.insert(target);
        if (call.outputs.empty() || targets.size() != call.outputs.size())
            refuse(where + ": outputs " + repr(call.outputs) + " must name at least one place, each once");
        for (const auto& [name, text] : call.inputs) {
            TensorSpec actual = source(section, where, text);
            const TensorSpec& expected = signature.inputs.at(name);
            const std::string at = where + ": " + name + " = " + text;
            fit(actual, expected, at);
            check_rows(actual, expected, alone, at);
        }
        for (const auto& [name, target] : call.outputs) {
            TensorSpec spec = signature.outputs.at(name);
            if (alone && !spec.shape.empty() && spec.shape[0] == BATCH) spec = spec.rows(ONE);
            output(section, where + ": " + name + " -> " + target, spec, target, shared);
        }
    }

    Named<TensorSpec> job;
    std::set<std::string> written;

   private:
    const Program& program_;
    const Named<Signature>& components_;
    const Named<TensorSpec>& constants_;
    Named<TensorSpec> tile_;
    std::vector<std::pair<Tiles, Named<TensorSpec>>> tile_values_;
    std::set<std::string> names_, fresh_;
    const Pass* now_ = nullptr;
    bool joined_ = false;

    Named<TensorSpec>& of_tiles(const Tiles& tiles) {
        for (auto& [key, values] : tile_values_)
            if (key == tiles) return values;
        return tile_values_.emplace_back(tiles, Named<TensorSpec>{}).second;
    }

    void check_state(const std::string& where, const std::string& name, const State& state) {
        const std::string at = where + ": state " + repr(name);
        check_name(at, name);
        if (program_.grids.count(name) || job.count(name) || tile_.count(name)) refuse(at + " hides a grid or a value; rename it");
        for (const auto& dim : state.shape)
            if (dim.named() && program_.multiple_px % std::stoll(dim.name.substr(2)))
                refuse(at + ": " + repr(dim.name) + " does not divide multiple_px " + std::to_string(program_.multiple_px));
    }

    TensorSpec source(const std::string& section, const std::string& place, const std::string& source) const {
        const std::string where = place + ": " + repr(source);
        char kind = source.empty() ? '\0' : source[0];
        std::string name = source.empty() ? source : source.substr(1);
        if (kind == '@') return table(section, where, name);
        if (kind == '~') return noise(where, name);
        if (kind == '#') return look_up(constants_, name, where + ": no such constant in the bundle");
        if (kind == '$') return look_up(program_.inputs, name, where + ": the program has no such input").spec();
        if (program_.grids.count(source)) return grid(section, where, source);
        return look_up(merged(job, tile_), source, where + ": nothing of that name is known here");
    }

    TensorSpec crop(const Grid& grid) const {
        auto side = [&](const char* axis) { return Dim{0, axis + std::to_string(grid.px)}; };
        return {"float32", {BATCH, Dim{grid.channels, ""}, side("h/"), side("w/")}};
    }

    TensorSpec grid(const std::string& section, const std::string& where, const std::string& name) const {
        const Grid& grid = program_.grids.at(name);
        if (grid.init == "none" && !written.count(name)) refuse(where + ": the grid is read before any earlier pass writes it");
        if (fresh_.count(name) && !(section == "each" && joined_))
            refuse(where + ": the grid is read in " + section + " of the pass that writes it; use another grid");
        return crop(grid);
    }

    TensorSpec noise(const std::string& where, const std::string& name) const {
        if (program_.grids.count(name)) return crop(program_.grids.at(name));
        const State& state = look_up(now_->state, name, where + ": noise needs a grid or a state of this pass");
        if (state.shape.size() != 3) refuse(where + ": noise needs a shape of channels, rows, columns, not " + repr(state.shape));
        TensorSpec spec{"float32", {BATCH}};
        spec.shape.insert(spec.shape.end(), state.shape.begin(), state.shape.end());
        return spec;
    }

    TensorSpec table(const std::string& section, const std::string& where, const std::string& name) const {
        if (!now_->steps) refuse(where + ": a table needs a pass with steps");
        const Strings& tables = SCHEDULE_TABLES.at(now_->steps->schedule);
        if (std::find(tables.begin(), tables.end(), name) != tables.end())
            return section == "each" ? TensorSpec{"float32", {ONE}} : TensorSpec{"float32", {ONE, Dim{0, "steps"}}};
        if (section != "each") refuse(where + ": outside 'each' only a schedule's tables can be read as a table");
        std::vector<TensorSpec> sized;
        for (const auto& [constant, spec] : constants_) {
            const std::string digits = constant.compare(0, name.size() + 1, name + ".") == 0 ? constant.substr(name.size() + 1) : "";
            if (!digits.empty() && digits.find_first_not_of("0123456789") == std::string::npos) sized.push_back(spec);
        }
        for (const auto& spec : sized)
            if (!(spec == sized[0])) refuse(where + ": the tables of tile sizes differ in type or shape; rebuild the bundle");
        const Shape sides = now_->tiles ? now_->tiles->fixed_px : Shape{};
        bool lacks = sides.empty();
        for (auto px : sides) lacks = lacks || px > INT32_MAX || !constants_.count(name + "." + std::to_string(px * px / now_->steps->px_per_token));
        if (!sized.empty() && lacks) refuse(where + ": a table of tile sizes needs fixed_px, and one for each of " + repr(sides));
        Named<TensorSpec> known = constants_;
        if (!sized.empty()) known[name] = sized[0];
        TensorSpec whole = look_up(merged(merged(known, job), tile_), name, where + ": no table, value or constant has that name");
        if (whole.shape.size() < 2) refuse(where + ": a single number has no rows");
        const Dim& rows = whole.shape[1];
        if (!rows.named() && rows.size != now_->steps->count)
            refuse(where + ": has " + std::to_string(rows.size) + " rows for " + std::to_string(now_->steps->count) + " steps");
        whole.shape.erase(whole.shape.begin() + 1);
        return whole;
    }

    void output(const std::string& section, const std::string& where, const TensorSpec& spec, const std::string& target, bool shared) {
        check_name(where, target);
        if (program_.grids.count(target)) {
            if (target == "image") refuse(where + ": the input is not written to; use another grid");
            fit(spec, crop(program_.grids.at(target)), where);
            fresh_.insert(target);
            return;
        }
        bool used = job.count(target) || constants_.count(target) || program_.inputs.count(target);
        if (used || (tile_.count(target) && !now_->state.count(target) && section != "each"))
            refuse(where + ": the name is taken; give every value its own");
        if (tile_.count(target)) fit(spec, tile_[target], where);
        (shared ? job : tile_)[target] = spec;
    }
};

void check(const Program& program, const Named<Signature>& components, const Named<TensorSpec>& constants) {
    check_grids(program);
    for (const auto& [name, spec] : program.inputs) check_input(name, spec, constants);
    check_texts(program);
    check_arguments(program);
    Scope scope(program, components, constants);
    for (const auto& p : program.passes) {
        scope.enter(p);
        for (const auto& placed : p.calls())
            scope.call(placed.section,
                       "pass " + repr(p.name) + ", " + placed.section + "[" + std::to_string(placed.position) + "] runs " + repr(placed.call->run),
                       *placed.call);
        scope.leave();
    }
    Named<bool> values;
    for (const auto& [name, spec] : program.inputs) values[name] = true;
    for (const auto& name : program.untiled_values())
        if (scope.job.count(name)) values[name] = true;
    for (const auto& [argument, file] : program.files) {
        const std::string where = "program: file " + repr(argument);
        if (program.inputs.count(argument)) refuse(where + ": the name is taken; give every argument its own");
        for (const auto& [tensor, name] : file.tensors) look_up(values, name, where + ": no input or value " + repr(name));
    }
    if (!scope.written.count("result")) refuse("program: no pass writes the grid 'result'; add the call that makes it");
}

}  // namespace

void check_program(const Program& program, const Named<Signature>& components, const Named<TensorSpec>& constants) {
    try {
        check(program, components, constants);
    } catch (const Error& error) {
        throw Error(error.code, one_line(error.what()));
    }
}

}  // namespace tw
