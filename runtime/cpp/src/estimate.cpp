#include "estimate.hpp"

#include <algorithm>
#include <cstdio>

#include "machine.hpp"

namespace tw {
namespace {

constexpr double OPEN_SHARE = 0.7;  // share of the free memory for all engines together; the rest is for work
constexpr std::int64_t PROCESS_BYTES = 80000000;  // Python's, NumPy's, Pillow's and ONNX Runtime's; here it is less
constexpr double ARENA = 1.4;       // memory for calls in proportion to the values alive, measured
constexpr std::int64_t GRAPH = 30;  // bytes of an open engine for each byte of its graph's file

using Planned = std::pair<const Pass*, TilePlan>;

std::int64_t width_in_memory(const std::string& dtype) {
    static const Named<std::int64_t> widths = {{"float64", 8}, {"int64", 8}, {"float16", 2}, {"bfloat16", 2}, {"int16", 2}, {"int8", 1}, {"uint8", 1}, {"bool", 1}};
    auto width = widths.find(dtype);
    return width == widths.end() ? 4 : width->second;
}

std::string gib(std::int64_t bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (1 << 30));
    return text;
}

std::string table_of(const std::string& component, const EngineSpec& spec) { return spec.weights && !spec.weights->empty() ? *spec.weights : component; }

// The memory that the weights of open engines take for themselves: re-packed, or reordered for convolutions.
std::int64_t weights_bytes(const Setting& setting, const Specs& specs) {
    std::int64_t bytes = 0;
    std::set<std::string> wide, stored;
    for (const auto& [name, spec] : specs) {
        bytes += setting.low_memory ? spec->memory.copied : 0;
        (spec->precision == "float32" ? wide : stored).insert(table_of(name, *spec));
    }
    if (setting.low_memory) return bytes;
    for (const auto& [table, references] : setting.bundle->weights.tensors)
        for (const auto& [name, reference] : references)
            bytes += wide.count(table) ? 4 * product(reference.shape) : stored.count(table) ? reference.length : 0;
    return bytes;
}

std::int64_t graph_bytes(const Setting& setting, const Specs& specs) {
    std::int64_t bytes = 0;
    for (const auto& [name, spec] : specs) bytes += setting.bundle->manifest.files.at(spec->files[0]).size;
    return bytes;
}

Specs part_of(const Specs& specs, const std::set<std::string>& names) {
    Specs part;
    for (const auto& [name, spec] : specs)
        if (names.count(name)) part[name] = spec;
    return part;
}

// A size of a shape; `h/2` is half of `h`. One that no input has counts as 1.
std::int64_t size_of(const Dim& dim, const Named<std::int64_t>& named) {
    if (!dim.named()) return dim.size;
    if (auto entry = named.find(dim.name); entry != named.end()) return entry->second;
    std::size_t slash = dim.name.find('/');
    auto whole = named.find(dim.name.substr(0, slash));
    std::int64_t part = slash == std::string::npos ? 1 : std::stoll(dim.name.substr(slash + 1));
    return (whole == named.end() ? 1 : whole->second) / part;
}

// The bytes that a job holds between calls: parts of grids, values of tiles, values of the job.
class Held {
   public:
    Held(const Bundle& bundle, const std::vector<Planned>& passes, std::optional<std::int64_t> steps, std::int64_t devices)
        : bundle_(bundle), grids_(bundle.program.grids), passes_(passes), steps_(steps), devices_(devices) {
        std::map<std::int64_t, std::set<std::string>> of_tiles;
        for (std::size_t place = 0; place < passes.size(); ++place) {
            const Pass& p = *passes[place].first;
            std::set<std::string> shared = p.tiles ? shared_values(p, of_tiles[scope(p)]) : std::set<std::string>{};
            std::int64_t of_tile = 0;
            for (const auto& [name, size] : sizes_of(p, passes[place].second)) {
                std::size_t last = last_reader(name, place);
                if (!p.tiles || shared.count(name)) {
                    job_ += size;
                } else if (last > place) {
                    spans_.push_back({place, last, size, passes[place].second.count()});
                } else {
                    of_tile += size;
                }
            }
            open_.push_back(of_tile);
        }
        for (std::size_t place = 0; place < passes.size(); ++place)  // `result` goes to the picture at once
            for (const auto& name : passes[place].first->writes())
                if (grids_.count(name)) spans_.push_back({place, last_reader(name, place), part_bytes(name, passes[place].second), passes[place].second.count()});
    }

    // The most that is held while a pass runs.
    std::int64_t at(std::size_t place) const {
        const auto& [p, plan] = passes_[place];
        std::int64_t stays = job_, goes = 0, comes = 0, written = 0, generation = 0;
        for (const auto& span : spans_) {
            std::int64_t bytes = span.bytes * span.tiles;
            if (span.first < place && place < span.last) stays += bytes;
            if (span.first < place && place == span.last) goes += bytes;
            if (span.first == place && place < span.last) comes += bytes;
        }
        std::set<std::string> each = p->writes("each");
        bool joined = false;
        for (const auto& name : p->writes()) {
            if (!grids_.count(name)) continue;
            written += part_bytes(name, plan);
            if (each.count(name)) generation += plan.count() * part_bytes(name, plan), joined = true;
        }
        std::int64_t ready = p->each.empty() ? 2 * devices_ : 4 * devices_ - 2;
        std::int64_t tiles = joined ? plan.count() : std::min(plan.count(), ready * (p->tiles ? p->tiles->batch : 1));
        std::int64_t front = std::min(plan.count(), static_cast<std::int64_t>(plan.lefts.size()) + 2 + 2 * devices_);  // parts that wait for the next row
        return stays + std::max({goes, comes, joined ? generation : 0}) + front * written + tiles * open_[place];
    }

   private:
    struct Span {  // written by a pass, read last by a pass
        std::size_t first, last;
        std::int64_t bytes, tiles;
    };
    const Bundle& bundle_;
    const Named<Grid>& grids_;
    const std::vector<Planned>& passes_;
    std::optional<std::int64_t> steps_;
    std::int64_t devices_, job_ = 0;
    std::vector<Span> spans_;
    Shape open_;  // pass -> bytes of an open tile
    std::map<std::pair<std::int64_t, std::string>, Shape> shapes_;

    // Passes with the same tiles share their values; those without tiles have -1.
    std::int64_t scope(const Pass& p) const {
        for (std::size_t i = 0; p.tiles && i < passes_.size(); ++i)
            if (passes_[i].first->tiles && *passes_[i].first->tiles == *p.tiles) return static_cast<std::int64_t>(i);
        return -1;
    }

    std::size_t last_reader(const std::string& name, std::size_t place) const {
        std::size_t last = place;
        bool read = false;
        for (std::size_t i = 0; i < passes_.size(); ++i)
            if (passes_[i].first->reads().count(name)) last = i, read = true;
        return read ? last : place;
    }

    // The values that a pass computes once for all of its tiles; `of_tiles` gets the names of the others.
    std::set<std::string> shared_values(const Pass& p, std::set<std::string>& of_tiles) const {
        std::set<std::string> shared;
        of_tiles.merge(key_set(grids_));
        of_tiles.merge(key_set(p.state));
        for (const auto& placed : p.calls()) {
            bool alone = std::string(placed.section) == "once" && placed.call->shared(of_tiles);
            for (const auto& [output, target] : placed.call->outputs) (alone ? shared : of_tiles).insert(target);
        }
        return shared;
    }

    std::int64_t part_bytes(const std::string& grid, const TilePlan& plan) const {
        const Grid& g = grids_.at(grid);
        return 4 * g.channels * (plan.tile_height / g.px) * (plan.tile_width / g.px);
    }

    // The bytes of each value that a pass writes for one tile, or for the job.
    Named<std::int64_t> sizes_of(const Pass& p, const TilePlan& plan) {
        Named<std::int64_t> sizes;
        std::int64_t its = scope(p);
        for (const auto& [name, state] : p.state) {
            Shape shape = state.of_tile(plan.tile_height, plan.tile_width);
            shape.insert(shape.begin(), 1);
            sizes[name] = 4 * product(shapes_[{its, name}] = shape);
        }
        for (const auto& placed : p.calls()) {
            const Component& component = bundle_.manifest.components.at(placed.call->run);
            Named<std::int64_t> named = {{"batch", 1}, {"steps", p.steps ? steps_.value_or(p.steps->count) : 1}};
            for (const auto& [input, source] : placed.call->inputs) {
                Shape shape = shape_of(source.substr(source.find_first_not_of('~')), its, plan);
                const Dims& dims = component.inputs.at(input).shape;
                for (std::size_t i = 0; i < std::min(dims.size(), shape.size()); ++i)
                    if (dims[i].named()) named.emplace(dims[i].name, shape[i]);
            }
            for (const auto& [output, target] : placed.call->outputs) {
                if (grids_.count(target)) continue;
                const TensorSpec& spec = component.outputs.at(output);
                Shape shape;
                for (const auto& dim : spec.shape) shape.push_back(size_of(dim, named));
                sizes[target] = width_in_memory(spec.dtype) * product(shapes_[{its, target}] = shape);
            }
        }
        return sizes;
    }

    Shape shape_of(const std::string& source, std::int64_t its, const TilePlan& plan) const {
        if (auto grid = grids_.find(source); grid != grids_.end())
            return {1, grid->second.channels, plan.tile_height / grid->second.px, plan.tile_width / grid->second.px};
        for (auto scope : {its, std::int64_t{-1}})
            if (auto shape = shapes_.find({scope, source}); shape != shapes_.end()) return shape->second;
        return {};
    }
};

// The memory inside the largest call of a pass, on all devices that its tiles can keep busy.
double calls_bytes(const Setting& setting, const Planned& planned) {
    const auto& [p, plan] = planned;
    std::int64_t batch = p->tiles ? p->tiles->batch : 1, at_once = std::min(setting.devices, (plan.count() + batch - 1) / batch);
    double most = 0;
    for (const auto& placed : p->calls()) {
        const Memory& memory = setting.specs.at(placed.call->run)->memory;
        auto px = static_cast<double>(plan.tile_height * plan.tile_width);
        double of_tile = memory.per_tile + memory.per_px * px + memory.per_px2 * px * px;
        double call = memory.fixed + static_cast<double>(p->tiles ? std::min(batch, plan.count()) : 1) * of_tile;
        most = std::max(most, static_cast<double>(at_once) * call);
    }
    return most;
}

std::int64_t needed_bytes(const Setting& setting, const std::vector<Planned>& passes, std::int64_t height, std::int64_t width, const Size& size, bool open) {
    const Bundle& bundle = *setting.bundle;
    Held held(bundle, passes, size.steps, setting.devices);
    double peak = 0;
    for (std::size_t place = 0; place < passes.size(); ++place) {
        std::set<std::string> called;
        for (const auto& placed : passes[place].first->calls()) called.insert(placed.call->run);
        double most = 0;
        for (std::size_t before = open ? 0 : place; before <= place; ++before) most = std::max(most, calls_bytes(setting, passes[before]));
        double working = (setting.copies > 0 ? ARENA : 0) * most;
        Specs opened = open ? setting.specs : part_of(setting.specs, called);
        std::int64_t engines = weights_bytes(setting, opened) + GRAPH * graph_bytes(setting, opened);
        peak = std::max(peak, static_cast<double>(held.at(place)) + working + static_cast<double>(setting.copies * engines));
    }
    std::int64_t picture = 3 * height * width + 3 * height * width / (bundle.program.scale * bundle.program.scale);  // the result and the source
    std::int64_t fixed = bundle.manifest.constants ? bundle.manifest.files.at(*bundle.manifest.constants).size : 0;
    return static_cast<std::int64_t>(static_cast<double>(PROCESS_BYTES + picture * size.bits / 8 + fixed) + peak);
}

struct Planning {
    std::vector<Planned> passes;
    std::int64_t height, width;
};

Planning planning(const Setting& setting, const Size& size, std::optional<std::int64_t> tile) {
    const Program& program = setting.bundle->program;
    std::int64_t least = least_px(program, tile, shortest_tile(setting.specs)), multiple = program.multiple_px;
    auto padded = [&](std::int64_t side) { return (std::max(side * size.scale, least) + multiple - 1) / multiple * multiple; };
    Planning planning{{}, padded(size.height), padded(size.width)};
    for (const auto& p : program.passes) planning.passes.emplace_back(&p, plan_of(program, p, planning.height, planning.width, tile, size.overlap));
    return planning;
}

// Refuses tiles that an engine was not made for.
void require_tiles(const Setting& setting, const Planning& planning) {
    for (const auto& [p, plan] : planning.passes) {
        if (!p->tiles) continue;
        for (const auto& placed : p->calls())
            for (auto side : {plan.tile_height, plan.tile_width}) {
                const EngineSpec& spec = *setting.specs.at(placed.call->run);
                if (auto reason = outside(spec, side); !reason.empty())
                    throw Error(usage, "engine " + spec.name + " of " + placed.call->run + " " + reason + "; use another tile or engine");
            }
    }
}

// The bytes in low memory with the smallest tiles, and the options that ask for both.
std::pair<std::int64_t, Strings> least_memory(const Setting& setting, const Size& size) {
    Setting low = setting;
    low.low_memory = true;
    std::optional<std::int64_t> tile = size.tile;
    Planning plans = planning(setting, size, tile);
    while (true) {
        Named<TilePlan> by_name;
        for (const auto& [p, plan] : plans.passes) by_name[p->name] = plan;
        auto smaller = smaller_tile(setting.bundle->program, by_name, size.overlap, shortest_tile(setting.specs));
        if (!smaller) break;
        tile = smaller;
        plans = planning(setting, size, tile);
    }
    Strings options;
    if (tile != size.tile) options.push_back("tile " + std::to_string(*tile));
    if (!setting.low_memory) options.emplace_back("low_memory");
    return {needed_bytes(low, plans.passes, plans.height, plans.width, size, false), options};
}

}  // namespace

bool all_open(const Setting& setting, std::optional<std::int64_t> available) {
    bool fits = !available || static_cast<double>(setting.copies * weights_bytes(setting, setting.specs)) < OPEN_SHARE * static_cast<double>(*available);
    return !setting.low_memory && fits;
}

std::int64_t shortest_tile(const Specs& specs) {
    std::int64_t shortest = 1;
    for (const auto& [name, spec] : specs) shortest = std::max(shortest, spec->profile.side_px.least);
    return shortest;
}

Estimate estimate(const Setting& setting, const Size& size, const std::set<std::string>& opened) {
    Planning plans = planning(setting, size, size.tile);
    require_tiles(setting, plans);
    std::optional<std::int64_t> available = available_bytes();
    if (available) *available += setting.copies * weights_bytes(setting, part_of(setting.specs, opened));
    bool limited = setting.memory_limit && (!available || *setting.memory_limit < *available);
    if (limited) available = setting.memory_limit;
    std::int64_t needed = needed_bytes(setting, plans.passes, plans.height, plans.width, size, all_open(setting, available));
    return {needed, available, limited};
}

void require_memory(const Setting& setting, const Size& size, const std::set<std::string>& opened) {
    Estimate needs = estimate(setting, size, opened);
    if (!needs.available_bytes || needs.needed_bytes <= *needs.available_bytes) return;
    auto [least, options] = least_memory(setting, size);
    throw Error(resource, std::to_string(size.width * size.scale) + "x" + std::to_string(size.height * size.scale) + " px needs about " +
                              gib(needs.needed_bytes) + " of memory, " + gib(*needs.available_bytes) + " are " + (needs.limited ? "allowed" : "free") + "; " +
                              (options.empty() ? "use a smaller image" : "the least is " + gib(least) + ", with " + join(options, " and ")));
}

}  // namespace tw
