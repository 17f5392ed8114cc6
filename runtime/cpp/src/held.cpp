#include "held.hpp"

#include <algorithm>

namespace tw {
namespace {

std::int64_t width_in_memory(const std::string& dtype) {
    static const Named<std::int64_t> widths = {{"float64", 8}, {"int64", 8}, {"float16", 2}, {"bfloat16", 2}, {"int16", 2}, {"int8", 1}, {"uint8", 1}, {"bool", 1}};
    auto width = widths.find(dtype);
    return width == widths.end() ? 4 : width->second;
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

}  // namespace

Held::Held(const Bundle& bundle, const std::vector<Planned>& passes, std::optional<std::int64_t> steps, std::int64_t devices)
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

std::int64_t Held::at(std::size_t place) const {
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
    std::int64_t changes = joined ? goes + std::max(comes, generation) : std::max(goes, comes);  // joined steps read what goes until the last of them
    return stays + changes + front * written + tiles * open_[place];
}

// Passes with the same tiles share their values; those without tiles have -1.
std::int64_t Held::scope(const Pass& p) const {
    for (std::size_t i = 0; p.tiles && i < passes_.size(); ++i)
        if (passes_[i].first->tiles && *passes_[i].first->tiles == *p.tiles) return static_cast<std::int64_t>(i);
    return -1;
}

std::size_t Held::last_reader(const std::string& name, std::size_t place) const {
    std::size_t last = place;
    bool read = false;
    for (std::size_t i = 0; i < passes_.size(); ++i)
        if (passes_[i].first->reads().count(name)) last = i, read = true;
    return read ? last : place;
}

// The values that a pass computes once for all of its tiles; `of_tiles` gets the names of the others.
std::set<std::string> Held::shared_values(const Pass& p, std::set<std::string>& of_tiles) const {
    std::set<std::string> shared;
    of_tiles.merge(key_set(grids_));
    of_tiles.merge(key_set(p.state));
    for (const auto& placed : p.calls()) {
        bool alone = std::string(placed.section) == "once" && placed.call->shared(of_tiles);
        for (const auto& [output, target] : placed.call->outputs) (alone ? shared : of_tiles).insert(target);
    }
    return shared;
}

std::int64_t Held::part_bytes(const std::string& grid, const TilePlan& plan) const {
    const Grid& g = grids_.at(grid);
    return 4 * g.channels * (plan.tile_height / g.px) * (plan.tile_width / g.px);
}

// The bytes of each value that a pass writes for one tile, or for the job.
Named<std::int64_t> Held::sizes_of(const Pass& p, const TilePlan& plan) {
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

Shape Held::shape_of(const std::string& source, std::int64_t its, const TilePlan& plan) const {
    if (auto grid = grids_.find(source); grid != grids_.end())
        return {1, grid->second.channels, plan.tile_height / grid->second.px, plan.tile_width / grid->second.px};
    for (auto scope : {its, std::int64_t{-1}})
        if (auto shape = shapes_.find({scope, source}); shape != shapes_.end()) return shape->second;
    return {};
}

}  // namespace tw
