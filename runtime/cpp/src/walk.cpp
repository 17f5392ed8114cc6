#include "walk.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tw {

namespace {

// What one node wrote, before it is stored.
struct Outputs {
    std::map<std::string, Tensor> parts, values;
};

struct Fed {
    Tensor value;
    bool of_tile;
};

Tensor concatenated(const std::vector<Fed>& rows) {
    Tensor first = rows[0].value;
    Shape shape = first.shape;
    shape[0] = static_cast<std::int64_t>(rows.size());
    auto data = std::shared_ptr<char[]>(new char[first.bytes() * rows.size()]);
    for (std::size_t i = 0; i < rows.size(); ++i) {
        if (rows[i].value.shape != first.shape || rows[i].value.dtype != first.dtype) throw Error(internal, "rows of one call differ in shape");
        std::memcpy(data.get() + i * first.bytes(), rows[i].value.data.get(), first.bytes());
    }
    return {first.dtype, shape, data};
}

Tensor row_of(const Tensor& all, std::size_t row) {
    Shape shape = all.shape;
    shape[0] = 1;
    std::size_t size = all.bytes() / static_cast<std::size_t>(all.shape[0]);
    return {all.dtype, shape, std::shared_ptr<const void>(all.data, static_cast<const char*>(all.data.get()) + row * size)};
}

class Walk {
   public:
    explicit Walk(const Job& job)
        : job_(job), program_(*job.program), layout_(layout(program_, job.image->height(), job.image->width(), job.tile, job.overlap, job.steps)),
          graph_(lower(program_, layout_.plans, layout_.steps)), final_(graph_.last_writer.at("result")) {
        const TilePlan& plan = graph_.plan(graph_.blocks[final_]);
        regions_.emplace(regions(plan), rectangles(plan));
        take_inputs();
        for (std::int64_t i = 0; i < plan.count(); ++i) waiting_[i] = static_cast<std::int64_t>(regions_->below(i).size());
        for (const auto& block : graph_.blocks)
            for (const auto& [grid, writer] : block.reads)
                if (writer >= 0) last_reader_[{grid, writer}] = block.number;
    }

    void run() {
        Named<std::int64_t> totals, done;
        for (const auto& block : graph_.blocks)
            if (block.section != "shared") totals[graph_.pass(block).name] += block.size;
        for (const auto& block : graph_.blocks) {
            const Pass& p = graph_.pass(block);
            if (skipped_.count(p.name)) continue;
            for (std::int64_t tile = 0; tile < block.size; tile += block.batch) {
                std::int64_t count = std::min(block.batch, block.size - tile);
                nodes(block, tile, count);
                if (block.section == "shared") continue;
                done[p.name] += count;
                if (job_.on_progress) job_.on_progress(p.name, done[p.name], totals[p.name]);
            }
            forget(block);
        }
    }

   private:
    using Written = std::pair<std::string, std::int64_t>;  // grid, block
    const Job& job_;
    const Program& program_;
    Layout layout_;
    Graph graph_;
    std::int64_t final_;
    std::optional<Beneath> regions_;
    std::set<std::string> skipped_;
    Named<Tensor> inputs_, job_values_;
    std::map<std::pair<std::string, std::int64_t>, std::map<std::string, Tensor>> tiles_;
    std::map<Written, std::map<std::int64_t, Tensor>> parts_;
    std::map<Written, std::int64_t> last_reader_;
    std::map<std::int64_t, std::int64_t> waiting_;  // region of the result that has not been handed on -> parts that it lacks
    std::map<std::pair<std::string, std::int64_t>, std::pair<std::vector<Floats>, std::vector<Floats>>> ramps_;

    // ---- inputs

    // The passes without tiles whose values the caller gives need not run. All other inputs are checked before any work.
    void take_inputs() {
        std::set<std::string> values = program_.untiled_values();
        for (const auto& [name, tensor] : job_.inputs)
            if (values.count(name)) job_values_[name] = tensor;
        for (const auto& p : program_.passes) {
            if (p.tiles) continue;
            std::string given, missing;
            for (const auto& name : p.writes()) {
                std::string& kind = job_.inputs.count(name) ? given : missing;
                if (kind.empty()) kind = name;
            }
            if (given.empty()) continue;
            if (!missing.empty()) throw Error(usage, "input " + repr(given) + " is given without " + repr(missing) + "; give all or none");
            skipped_.insert(p.name);
        }
        for (const auto& p : program_.passes) {
            if (skipped_.count(p.name)) continue;
            for (const auto& placed : p.calls())
                for (const auto& [name, source] : placed.call->inputs)
                    if (source[0] == '$') take_input(source.substr(1));
        }
    }

    void take_input(const std::string& name) {
        if (inputs_.count(name)) return;
        if (auto entry = job_.inputs.find(name); entry != job_.inputs.end()) {
            inputs_[name] = entry->second;
            return;
        }
        const Input& spec = program_.inputs.at(name);
        if (spec.standard.kind == Scalar::words) {
            inputs_[name] = job_.constants->at(spec.standard.text.substr(1));
            return;
        }
        std::string label = name;
        for (const auto& [file, f] : program_.files)
            for (const auto& [tensor, target] : f.tensors)
                if (target == name) label = file;
        for (const auto& [text, t] : program_.texts)
            if (t.ids.count(name)) label = text;
        throw Error(usage, label + " has no default; give it a value");
    }

    // ---- what a call reads

    const TilePlan& plan(const Block& block) const { return graph_.plan(block); }

    // Values of a tile are shared by the passes with the same tiles.
    std::pair<std::string, std::int64_t> key(const Pass& p, std::int64_t tile) const {
        if (!p.tiles) return {"pass " + p.name, tile};
        for (const auto& other : program_.passes)
            if (other.tiles && *other.tiles == *p.tiles) return {other.name, tile};
        return {p.name, tile};
    }

    Fed feed(const Block& block, std::int64_t tile, const std::string& source, const Outputs& outputs) {
        const Pass& p = graph_.pass(block);
        const std::string name = source.substr(1);
        if (source[0] == '#') return {job_.constants->at(name), false};
        if (source[0] == '$') return {inputs_.at(name), false};
        if (source[0] == '~') {
            std::int64_t stream = block.section == "once" ? 0 : block.section == "each" ? 1 + block.step : 2 + block.step;
            return {noise(p, block, tile, name, stream), true};
        }
        if (source[0] == '@') return row(p, block, tile, name, outputs);
        if (program_.grids.count(source)) return {crop(block, tile, source), true};
        if (auto value = look_up(p, tile, source, outputs)) return *value;
        throw Error(internal, "pass " + repr(p.name) + ", " + block.section + ": no value " + repr(source));
    }

    std::optional<Fed> look_up(const Pass& p, std::int64_t tile, const std::string& name, const Outputs& outputs) {
        if (auto value = outputs.values.find(name); value != outputs.values.end()) return Fed{value->second, p.tiles.has_value()};
        if (auto values = tiles_.find(key(p, tile)); values != tiles_.end())
            if (auto value = values->second.find(name); value != values->second.end()) return Fed{value->second, true};
        if (auto value = job_values_.find(name); value != job_values_.end()) return Fed{value->second, false};
        return std::nullopt;
    }

    // This step's row of a table; the whole table outside `each`.
    Fed row(const Pass& p, const Block& block, std::int64_t tile, std::string name, const Outputs& outputs) {
        const Tables& tables = layout_.tables.at(p.name);
        if (auto table = tables.find(name); table != tables.end()) {
            if (block.section == "each") return {tensor_of(Floats{table->second[block.step]}, {1}), false};
            return {tensor_of(Floats(table->second), {1, static_cast<std::int64_t>(table->second.size())}), false};
        }
        const TilePlan& plan = this->plan(block);
        std::string sized = name + "." + std::to_string(plan.tile_height * plan.tile_width / p.steps->px_per_token);
        if (job_.constants->count(sized)) name = sized;
        auto value = look_up(p, tile, name, outputs);
        Fed whole = value ? *value : Fed{job_.constants->at(name), false};
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

    Tensor noise(const Pass& p, const Block& block, std::int64_t tile, const std::string& name, std::int64_t stream) const {
        Tile here = plan(block).tile(tile);
        if (auto entry = program_.grids.find(name); entry != program_.grids.end()) {
            const Grid& g = entry->second;
            std::int64_t rows = here.height / g.px, columns = here.width / g.px;
            return tensor_of(normal(job_.seed, 0, stream, g.channels, here.top / g.px, here.left / g.px, rows, columns), {1, g.channels, rows, columns});
        }
        Shape shape = p.state.at(name).of_tile(here.height, here.width);
        Floats numbers = normal(job_.seed, 1 + tile, stream, shape.at(0), 0, 0, shape.at(1), shape.at(2));
        shape.insert(shape.begin(), 1);
        return tensor_of(std::move(numbers), shape);
    }

    Tensor initial(const Pass& p, const Block& block, std::int64_t tile, const std::string& name) const {
        const State& state = p.state.at(name);
        if (state.init == "noise") return noise(p, block, tile, name, 0);
        Tile here = plan(block).tile(tile);
        Shape shape = state.of_tile(here.height, here.width);
        shape.insert(shape.begin(), 1);
        return tensor_of(Floats(product(shape), state.init == "ones" ? 1.0F : 0.0F), shape);
    }

    Tensor crop(const Block& block, std::int64_t tile, const std::string& name) {
        Tile here = plan(block).tile(tile);
        if (name == "image") return tensor_of(job_.image->crop(here.top, here.left, here.height, here.width), {1, 3, here.height, here.width});
        std::int64_t writer = block.reads.at(name);
        const Grid& grid = program_.grids.at(name);
        if (writer < 0) {
            Shape shape = {1, grid.channels, here.height / grid.px, here.width / grid.px};
            if (grid.init != "noise") return tensor_of(Floats(product(shape), 0.0F), shape);
            return tensor_of(normal(job_.seed, 0, 0, grid.channels, here.top / grid.px, here.left / grid.px, shape[2], shape[3]), shape);
        }
        Beneath over(rectangles(plan(block)), rectangles(plan(graph_.blocks[writer])));
        return gather(name, writer, here, over.below(tile));
    }

    // A rectangle of a grid [1, C, H, W]: the parts that overlap it, added in tile order.
    Tensor gather(const std::string& name, std::int64_t writer, const Tile& rectangle, const Shape& parts) {
        const TilePlan& plan = this->plan(graph_.blocks[writer]);
        auto& written = parts_.at({name, writer});
        const Grid& grid = program_.grids.at(name);
        if (parts.size() == 1 && plan.tile(parts[0]) == rectangle) return written.at(parts[0]);
        std::int64_t px = grid.px, rows = rectangle.height / px, columns = rectangle.width / px;
        std::int64_t top = rectangle.top / px, left = rectangle.left / px;
        Floats whole(product({grid.channels, rows, columns}), 0.0F);
        for (auto i : parts) {
            Tile tile = plan.tile(i);
            std::int64_t t = tile.top / px, l = tile.left / px, high = tile.height / px, wide = tile.width / px;
            std::int64_t y0 = std::max(t, top), y1 = std::min(t + high, top + rows), x0 = std::max(l, left), x1 = std::min(l + wide, left + columns);
            const float* part = written.at(i).floats();
            for (std::int64_t c = 0; c < grid.channels; ++c)
                for (std::int64_t y = y0; y < y1; ++y)
                    for (std::int64_t x = x0; x < x1; ++x)
                        whole[(c * rows + y - top) * columns + x - left] += part[(c * high + y - t) * wide + x - l];
        }
        return tensor_of(std::move(whole), {1, grid.channels, rows, columns});
    }

    // A part times its tile's ramps, ready to be added; a part that overlaps no other tile stays as it is.
    Tensor weighted(const Block& block, const std::string& grid, std::int64_t tile, const Tensor& part) {
        const TilePlan& plan = this->plan(block);
        Rectangles all = rectangles(plan);
        if (Beneath(all, all).below(tile).size() == 1) return part;
        std::int64_t px = program_.grids.at(grid).px;
        auto [ramps, fresh] = ramps_.try_emplace({graph_.pass(block).name, px});
        if (fresh) ramps->second = tile_weights(plan, px);
        auto columns_of_tiles = static_cast<std::int64_t>(plan.lefts.size());
        const Floats &row = ramps->second.first[tile / columns_of_tiles], &column = ramps->second.second[tile % columns_of_tiles];
        auto rows = static_cast<std::int64_t>(row.size()), columns = static_cast<std::int64_t>(column.size());
        Floats numbers(part.floats(), part.floats() + part.count());
        for (std::int64_t i = 0; i < static_cast<std::int64_t>(numbers.size()); ++i) {
            float times_column = numbers[i] * column[i % columns];
            numbers[i] = times_column * row[i / columns % rows];
        }
        return tensor_of(std::move(numbers), part.shape);
    }

    // ---- nodes

    void nodes(const Block& block, std::int64_t first, std::int64_t count) {
        const Pass& p = graph_.pass(block);
        std::vector<Outputs> outputs(count);
        if (block.section == "once")
            for (std::int64_t i = 0; i < count; ++i)
                for (const auto& [name, state] : p.state) outputs[i].values[name] = initial(p, block, first + i, name);
        for (const Call* call : block.calls) {
            if (job_.stopped && job_.stopped()) throw Error(cancelled, "cancelled");
            Named<Tensor> inputs;
            for (const auto& [name, source] : call->inputs) {
                std::vector<Fed> rows;
                for (std::int64_t i = 0; i < (source[0] == '#' ? 1 : count); ++i) rows.push_back(feed(block, first + i, source, outputs[i]));
                bool one = std::all_of(rows.begin(), rows.end(), [&](const Fed& row) { return !row.of_tile && row.value.same(rows[0].value); });
                inputs[name] = rows.size() == 1 || one ? rows[0].value : concatenated(rows);
            }
            Named<Tensor> results = job_.engine(call->run).run(inputs, keys(call->outputs));
            check(block, *call, inputs, results, count);
            for (const auto& [name, target] : call->outputs)
                for (std::int64_t i = 0; i < count; ++i) {
                    const Tensor& all = results.at(name);
                    Tensor row = count == 1 ? all : row_of(all, static_cast<std::size_t>(i));
                    if (program_.grids.count(target)) {
                        outputs[i].parts[target] = weighted(block, target, first + i, row);
                    } else {
                        outputs[i].values[target] = row;
                    }
                }
        }
        for (std::int64_t i = 0; i < count; ++i) commit(block, first + i, outputs[i]);
    }

    void commit(const Block& block, std::int64_t tile, Outputs& outputs) {
        const Pass& p = graph_.pass(block);
        for (auto& [name, value] : outputs.values) {
            bool of_job = block.section == "shared" || (!p.tiles && !p.state.count(name));
            (of_job ? job_values_[name] : tiles_[key(p, tile)][name]) = value;
        }
        for (auto& [grid, part] : outputs.parts) {
            bool is_result = grid == "result" && block.number == final_;
            if (is_result || last_reader_.count({grid, block.number})) parts_[{grid, block.number}][tile] = part;
        }
        if (block.number != final_) return;
        for (auto region : regions_->above(tile))
            if (--waiting_[region] == 0) hand_on(region);
    }

    // Reports a region of the result that is final, and drops the parts that no other region waits for.
    void hand_on(std::int64_t region) {
        const TilePlan& plan = this->plan(graph_.blocks[final_]);
        Rectangles all = regions(plan);
        auto columns = static_cast<std::int64_t>(all.columns.size());
        Interval row = all.rows[region / columns], column = all.columns[region % columns];
        Tile rectangle{0, row.begin, column.begin, row.end - row.begin, column.end - column.begin};
        Tensor whole = gather("result", final_, rectangle, regions_->below(region));
        if (job_.on_final) job_.on_final(row.begin, column.begin, whole.floats(), rectangle.height, rectangle.width);
        waiting_.erase(region);
        if (last_reader_.count({"result", final_})) return;
        for (auto part : regions_->below(region)) {
            Shape readers = regions_->above(part);
            bool done = std::none_of(readers.begin(), readers.end(), [&](std::int64_t r) { return waiting_.count(r) > 0; });
            if (done) parts_[{"result", final_}].erase(part);
        }
    }

    // Drops what no later block reads.
    void forget(const Block& block) {
        for (const auto& [written, reader] : last_reader_)
            if (reader == block.number && !(written == Written{"result", final_} && !waiting_.empty())) parts_.erase(written);
        bool ends = static_cast<std::size_t>(block.number) + 1 == graph_.blocks.size() || graph_.blocks[block.number + 1].place != block.place;
        if (!ends) return;
        std::set<std::string> later;
        for (auto i = static_cast<std::size_t>(block.place) + 1; i < program_.passes.size(); ++i) {
            auto reads = program_.passes[i].reads();
            later.insert(reads.begin(), reads.end());
        }
        for (auto& [place, values] : tiles_)
            for (auto value = values.begin(); value != values.end();) value = later.count(value->first) ? std::next(value) : values.erase(value);
    }

    // ---- what a network returned

    std::string when(const Block& block) const {
        std::string moment = block.section == "each" ? "step " + std::to_string(block.step + 1) : block.section == "shared" ? "once" : block.section;
        return "pass " + repr(graph_.pass(block).name) + ", " + moment;
    }

    void check(const Block& block, const Call& call, const Named<Tensor>& inputs, const Named<Tensor>& results, std::int64_t count) const {
        const Signature& signature = job_.signatures->at(call.run);
        std::map<std::string, std::int64_t> sizes = {{"batch", count}};
        for (const auto& [name, tensor] : inputs) {
            const Dims& dims = signature.inputs.at(name).shape;
            for (std::size_t i = 0; i < std::min(dims.size(), tensor.shape.size()); ++i)
                if (dims[i].named() && dims[i].name != "batch_or_1") sizes[dims[i].name] = tensor.shape[i];
        }
        for (const auto& [name, target] : call.outputs) {
            const Shape& shape = results.at(name).shape;
            const TensorSpec& spec = signature.outputs.at(name);
            Shape right;
            if (auto grid = program_.grids.find(target); grid != program_.grids.end()) {
                const TilePlan& plan = this->plan(block);
                right = {count, grid->second.channels, plan.tile_height / grid->second.px, plan.tile_width / grid->second.px};
            } else {
                for (std::size_t i = 0; i < spec.shape.size(); ++i) {
                    const Dim& dim = spec.shape[i];
                    if (!dim.named()) {
                        right.push_back(dim.size);
                    } else if (spec.shape.size() == shape.size()) {  // a size that no input has is as the first output says
                        right.push_back(sizes.emplace(dim.name, shape[i]).first->second);
                    } else {
                        right.push_back(sizes.count(dim.name) ? sizes.at(dim.name) : 0);
                    }
                }
            }
            const std::string place = when(block) + ": " + call.run + "." + name;
            if (shape != right)
                throw Error(damaged, place + " has shape " + repr(shape) + ", not " + repr(right) + "; verify the bundle with 'tilewright export verify'");
            if (results.at(name).dtype != spec.dtype)
                throw Error(damaged, place + " is " + results.at(name).dtype + ", not " + spec.dtype + "; verify the bundle with 'tilewright export verify'");
        }
        for (const auto& [name, target] : call.outputs) {
            const Tensor& tensor = results.at(name);
            if (tensor.dtype != "float32") continue;
            std::size_t wrong = 0, first = 0;
            for (std::size_t i = tensor.count(); i-- > 0;)
                if (!std::isfinite(tensor.floats()[i])) ++wrong, first = i;
            if (!wrong) continue;
            throw Error(accuracy, when(block) + ": " + call.run + "." + name + " holds " + repr(static_cast<double>(tensor.floats()[first])) + ", " +
                                      std::to_string(wrong) + " of " + std::to_string(tensor.count()) +
                                      " numbers are not finite; check the weights, and the bundle with 'tilewright export verify'");
        }
    }
};

}  // namespace

std::size_t width_of(const std::string& dtype) {
    static const std::map<std::string, std::size_t> widths = {{"float64", 8}, {"int64", 8},   {"float32", 4}, {"int32", 4},
                                                              {"float16", 2}, {"bfloat16", 2}, {"int16", 2}};
    auto width = widths.find(dtype);
    return width == widths.end() ? 1 : width->second;
}

std::size_t Tensor::count() const { return static_cast<std::size_t>(product(shape)); }
std::size_t Tensor::bytes() const { return count() * width_of(dtype); }

bool Tensor::same(const Tensor& other) const {
    if (dtype != other.dtype || shape != other.shape) return false;
    return data == other.data || std::memcmp(data.get(), other.data.get(), bytes()) == 0;
}

Tensor tensor_of(Floats&& numbers, Shape shape) {
    auto owner = std::make_shared<Floats>(std::move(numbers));
    return {"float32", std::move(shape), std::shared_ptr<const void>(owner, owner->data())};
}

Tensor tensor_of(const std::string& dtype, Shape shape, const void* data) {
    Tensor tensor{dtype, std::move(shape), nullptr};
    auto bytes = std::shared_ptr<char[]>(new char[tensor.bytes()]);
    if (tensor.bytes()) std::memcpy(bytes.get(), data, tensor.bytes());
    tensor.data = bytes;
    return tensor;
}

Layout layout(const Program& program, std::int64_t height, std::int64_t width, std::optional<std::int64_t> tile,
              std::optional<std::int64_t> overlap, std::optional<std::int64_t> steps) {
    Layout lay;
    for (const auto& p : program.passes) {
        const TilePlan& plan = lay.plans[p.name] = plan_of(program, p, height, width, tile, overlap);
        Tables& tables = lay.tables[p.name];
        if (!p.steps) continue;
        std::int64_t count = steps.value_or(p.steps->count), tokens = plan.tile_height * plan.tile_width / p.steps->px_per_token;
        tables = schedule(*p.steps, count, tokens);
        lay.steps[p.name] = count;
    }
    return lay;
}

void walk(const Job& job) { Walk(job).run(); }

}  // namespace tw
