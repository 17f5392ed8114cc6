#include "values.hpp"

#include <algorithm>

namespace tw {
namespace {

std::vector<std::int64_t> scopes(const Program& program) {
    std::vector<std::int64_t> all;
    for (const auto& p : program.passes) {
        std::int64_t scope = 0;
        while (&program.passes[scope] != &p && !(p.tiles && program.passes[scope].tiles && *p.tiles == *program.passes[scope].tiles)) ++scope;
        all.push_back(scope);
    }
    return all;
}

}  // namespace

Values::Values(const Graph& graph, const Layout& layout, const Enlarged& image, std::int64_t seed, const Named<Tensor>& constants,
               Named<Tensor> inputs, Named<Tensor> job, const std::vector<bool>& runs)
    : graph_(graph), program_(*graph.program), layout_(layout), image_(image), seed_(seed), constants_(constants), inputs_(std::move(inputs)),
      runs_(runs), final_(graph.last_writer.at("result")), places_(regions(graph.blocks[final_].plan)),
      regions_(places_, rectangles(graph.blocks[final_].plan)), scope_(scopes(program_)), job_(std::move(job)) {
    for (const auto& block : graph.blocks) {
        const Block* before = block.number ? &graph.blocks[block.number - 1] : nullptr;
        bool same = before && before->place == block.place && before->plan == block.plan;
        planned_.push_back(same ? planned_.back() : block.number);
        if (same) continue;
        Rectangles tiles = rectangles(block.plan);
        neighbours_.emplace(block.number, Beneath(tiles, tiles));
    }
    for (std::int64_t i = 0; i < graph.blocks[final_].plan.count(); ++i) waiting_.push_back(regions_.count_below(i));
}

Fed Values::feed(const Block& block, std::int64_t tile, const std::string& source, const Outputs& outputs) const {
    const std::string name = source.substr(1);
    if (source[0] == '#') return {constants_.at(name), false};
    if (source[0] == '$') return {inputs_.at(name), false};
    if (source[0] == '~') {
        std::int64_t stream = block.section == "once" ? 0 : block.section == "each" ? 1 + block.step : 2 + block.step;
        return {noise(block, tile, name, stream), true};
    }
    if (source[0] == '@') return row(block, tile, name, outputs);
    if (program_.grids.count(source)) return {crop(block, tile, source), true};
    if (auto value = look_up(block, tile, source, outputs)) return *value;
    throw Error(internal, "pass " + repr(graph_.pass(block).name) + ", " + block.section + ": no value " + repr(source));
}

// A value of this node, of its tile or of the job.
std::optional<Fed> Values::look_up(const Block& block, std::int64_t tile, const std::string& name, const Outputs& outputs) const {
    if (auto value = outputs.values.find(name); value != outputs.values.end()) return Fed{value->second, graph_.pass(block).tiles.has_value()};
    std::lock_guard guard(lock_);
    if (auto values = tiles_.find({scope_[block.place], tile}); values != tiles_.end())
        if (auto value = values->second.find(name); value != values->second.end()) return Fed{value->second, true};
    if (auto value = job_.find(name); value != job_.end()) return Fed{value->second, false};
    return std::nullopt;
}

// This step's row of a table; the whole table outside `each`.
Fed Values::row(const Block& block, std::int64_t tile, std::string name, const Outputs& outputs) const {
    const Pass& p = graph_.pass(block);
    const Tables& tables = layout_.tables.at(p.name);
    if (auto table = tables.find(name); table != tables.end()) {
        if (block.section == "each") return {tensor_of(Floats{table->second[block.step]}, {1}), false};
        return {tensor_of(Floats(table->second), {1, static_cast<std::int64_t>(table->second.size())}), false};
    }
    std::string sized = name + "." + std::to_string(block.plan.tile_height * block.plan.tile_width / p.steps->px_per_token);
    if (constants_.count(sized)) name = sized;
    auto value = look_up(block, tile, name, outputs);
    Fed whole = value ? *value : Fed{constants_.at(name), false};
    std::int64_t rows = whole.value.shape.at(1), steps = layout_.steps.at(p.name);
    if (rows != steps)  // a table for another number of steps has other sigmas
        throw Error(usage, "table " + repr(name) + " has " + std::to_string(rows) + " rows for " + std::to_string(steps) + " steps; use --steps " +
                               std::to_string(rows));
    Shape shape = whole.value.shape;
    shape.erase(shape.begin() + 1);
    if (whole.value.shape[0] != 1) throw Error(internal, "a table of several rows of tiles");
    std::size_t size = whole.value.bytes() / static_cast<std::size_t>(rows);
    const char* start = static_cast<const char*>(whole.value.data.get()) + static_cast<std::size_t>(block.step) * size;
    return {{whole.value.dtype, shape, std::shared_ptr<const void>(whole.value.data, start)}, whole.of_tile};
}

// For a grid the noise of the whole image under the tile; for a state a field of the tile's own.
Tensor Values::noise(const Block& block, std::int64_t tile, const std::string& name, std::int64_t stream) const {
    Tile here = block.plan.tile(tile);
    if (auto entry = program_.grids.find(name); entry != program_.grids.end()) {
        const Grid& g = entry->second;
        std::int64_t rows = here.height / g.px, columns = here.width / g.px;
        return tensor_of(normal(seed_, 0, stream, g.channels, here.top / g.px, here.left / g.px, rows, columns), {1, g.channels, rows, columns});
    }
    Shape shape = graph_.pass(block).state.at(name).of_tile(here.height, here.width);
    Floats numbers = normal(seed_, 1 + tile, stream, shape.at(0), 0, 0, shape.at(1), shape.at(2));
    shape.insert(shape.begin(), 1);
    return tensor_of(std::move(numbers), shape);
}

Tensor Values::initial(const Block& block, std::int64_t tile, const std::string& name) const {
    const State& state = graph_.pass(block).state.at(name);
    if (state.init == "noise") return noise(block, tile, name, 0);
    Tile here = block.plan.tile(tile);
    Shape shape = state.of_tile(here.height, here.width);
    shape.insert(shape.begin(), 1);
    return tensor_of(Floats(product(shape), state.init == "ones" ? 1.0F : 0.0F), shape);
}

Named<Tensor> Values::begun(const Block& block, std::int64_t tile) const {
    Named<Tensor> states;
    if (block.section == "once")
        for (const auto& [name, state] : graph_.pass(block).state) states[name] = initial(block, tile, name);
    return states;
}

Tensor Values::crop(const Block& block, std::int64_t tile, const std::string& name) const {
    Tile here = block.plan.tile(tile);
    if (name == "image") return tensor_of(image_.crop(here.top, here.left, here.height, here.width), {1, 3, here.height, here.width});
    const Read& read = block.reads.at(name);
    if (read.writer >= 0) return gather(name, read.writer, here, read.over->below(tile));
    const Grid& grid = program_.grids.at(name);
    Shape shape = {1, grid.channels, here.height / grid.px, here.width / grid.px};
    if (grid.init != "noise") return tensor_of(Floats(product(shape), 0.0F), shape);
    return tensor_of(normal(seed_, 0, 0, grid.channels, here.top / grid.px, here.left / grid.px, shape[2], shape[3]), shape);
}

// A rectangle of a grid [1, C, H, W]: the parts that overlap it, added in tile order.
Tensor Values::gather(const std::string& name, std::int64_t writer, const Tile& rectangle, const Shape& parts) const {
    const TilePlan& plan = graph_.blocks[writer].plan;
    std::vector<Tensor> written;
    {
        std::lock_guard guard(lock_);
        const auto& stored = parts_.at({name, writer});
        for (auto i : parts) written.push_back(stored.at(i));
    }
    const Grid& grid = program_.grids.at(name);
    if (parts.size() == 1 && plan.tile(parts[0]) == rectangle) return written[0];
    std::int64_t px = grid.px, rows = rectangle.height / px, columns = rectangle.width / px;
    std::int64_t top = rectangle.top / px, left = rectangle.left / px;
    Floats whole(product({grid.channels, rows, columns}), 0.0F);
    for (std::size_t i = 0; i < parts.size(); ++i) {
        Tile tile = plan.tile(parts[i]);
        std::int64_t t = tile.top / px, l = tile.left / px, high = tile.height / px, wide = tile.width / px;
        std::int64_t y0 = std::max(t, top), y1 = std::min(t + high, top + rows), x0 = std::max(l, left), x1 = std::min(l + wide, left + columns);
        const float* part = written[i].floats();
        for (std::int64_t c = 0; c < grid.channels; ++c)
            for (std::int64_t y = y0; y < y1; ++y) {
                float* to = whole.data() + (c * rows + y - top) * columns + x0 - left;
                const float* from = part + (c * high + y - t) * wide + x0 - l;
                for (std::int64_t x = 0; x < x1 - x0; ++x) to[x] += from[x];
            }
    }
    return tensor_of(std::move(whole), {1, grid.channels, rows, columns});
}

Tensor Values::weighted(const Block& block, const std::string& grid, std::int64_t tile, const Tensor& part) const {
    std::int64_t planned = planned_[block.number];
    if (neighbours_.at(planned).count_below(tile) == 1) return part;
    const Ramps* ramps = nullptr;
    {
        std::int64_t px = program_.grids.at(grid).px;
        std::lock_guard guard(lock_);
        auto [entry, fresh] = ramps_.try_emplace({planned, px});
        if (fresh) entry->second = tile_weights(block.plan, px);
        ramps = &entry->second;
    }
    auto columns_of_tiles = static_cast<std::int64_t>(block.plan.lefts.size());
    const Floats &row = ramps->first[tile / columns_of_tiles], &column = ramps->second[tile % columns_of_tiles];
    auto rows = static_cast<std::int64_t>(row.size()), columns = static_cast<std::int64_t>(column.size());
    Floats numbers(part.floats(), part.floats() + part.count());
    std::int64_t lines = static_cast<std::int64_t>(numbers.size()) / columns;
    for (std::int64_t line = 0; line < lines; ++line) {
        float* numbers_of_line = &numbers[line * columns];
        float factor = row[line % rows];
        for (std::int64_t x = 0; x < columns; ++x) {
            float times_column = numbers_of_line[x] * column[x];
            numbers_of_line[x] = times_column * factor;
        }
    }
    return tensor_of(std::move(numbers), part.shape);
}

Shape Values::commit(const Block& block, std::int64_t tile, const Outputs& outputs) {
    const Pass& p = graph_.pass(block);
    std::lock_guard guard(lock_);
    for (const auto& [name, value] : outputs.values) {
        bool of_job = block.section == "shared" || (!p.tiles && !p.state.count(name));
        (of_job ? job_[name] : tiles_[{scope_[block.place], tile}][name]) = value;
    }
    for (const auto& [grid, part] : outputs.parts) {
        Written written{grid, block.number};
        if (std::int64_t reads = readers(written, tile)) parts_[written][tile] = part, uses_[written][tile] = reads;
    }
    for (const auto& [grid, read] : block.reads)
        if (read.writer >= 0)
            for (auto part : read.over->below(tile)) used({grid, read.writer}, part);
    if (p.tiles && block.number == graph_.of_pass[block.place].back()) {  // the tile has ended: later passes read few of its values
        const std::set<std::string>& later = graph_.read_later[block.place];
        auto values = tiles_.find({scope_[block.place], tile});
        if (values != tiles_.end())
            for (auto value = values->second.begin(); value != values->second.end();)
                value = later.count(value->first) ? std::next(value) : values->second.erase(value);
    }
    Shape final;
    if (block.number == final_)
        for (auto region : regions_.above(tile))
            if (--waiting_[region] == 0) final.push_back(region);
    return final;
}

Tile Values::place_of(std::int64_t region) const {
    auto columns = static_cast<std::int64_t>(places_.columns.size());
    Interval row = places_.rows[region / columns], column = places_.columns[region % columns];
    return {region, row.begin, column.begin, row.end - row.begin, column.end - column.begin};
}

Tensor Values::region(std::int64_t region) const { return gather("result", final_, place_of(region), regions_.below(region)); }

void Values::handed_on(std::int64_t region) {
    std::lock_guard guard(lock_);
    for (auto part : regions_.below(region)) used({"result", final_}, part);
}

// How many nodes, and regions of the result, read the part of a tile.
std::int64_t Values::readers(const Written& written, std::int64_t tile) const {
    std::int64_t count = written == Written{"result", final_} ? regions_.count_above(tile) : 0;
    auto readers = graph_.readers.find(written);
    if (readers == graph_.readers.end()) return count;
    for (const auto& [block, over] : readers->second)
        if (runs_[block]) count += over->count_above(tile);
    return count;
}

void Values::used(const Written& written, std::int64_t tile) {
    auto uses = uses_.find(written);
    if (uses == uses_.end() || --uses->second.at(tile) > 0) return;
    uses->second.erase(tile);
    parts_[written].erase(tile);
}

}  // namespace tw
