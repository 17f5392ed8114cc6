#include "lower.hpp"

#include <algorithm>
#include <numeric>

namespace tw {
namespace {

// For each interval the range of those that it shares a pixel with; starts and ends both rise.
std::vector<Interval> touched(const std::vector<Interval>& readers, const std::vector<Interval>& writers) {
    std::vector<Interval> ranges;
    for (const auto& reader : readers) {
        auto first = std::upper_bound(writers.begin(), writers.end(), reader.begin, [](std::int64_t v, const Interval& w) { return v < w.end; });
        auto last = std::lower_bound(writers.begin(), writers.end(), reader.end, [](const Interval& w, std::int64_t v) { return w.begin < v; });
        ranges.push_back({first - writers.begin(), std::max(first, last) - writers.begin()});
    }
    return ranges;
}

std::string key_of(const std::optional<Tiles>& tiles) {
    if (!tiles) return "";
    auto whole = tiles->whole_up_to_px ? repr(Shape{(*tiles->whole_up_to_px)[0], (*tiles->whole_up_to_px)[1]}) : "";
    return repr(Shape{tiles->px, tiles->overlap_px, tiles->batch}) + whole + repr(tiles->fixed_px);
}

Shape all(std::int64_t size) {
    Shape tiles(size);
    std::iota(tiles.begin(), tiles.end(), 0);
    return tiles;
}

class Lowering {
   public:
    Lowering(const Program& program, const Named<TilePlan>& plans, const Named<std::int64_t>& steps, std::optional<std::int64_t> jitter)
        : plans_(plans), steps_(steps), jitter_(jitter) {
        graph_.program = &program;
    }

    Graph graph() {
        for (std::size_t i = 0; i < graph_.program->passes.size(); ++i) pass(static_cast<std::int64_t>(i));
        graph_.last_writer = grid_writer_;
        relate();
        return std::move(graph_);
    }

   private:
    using Place = std::pair<std::string, std::string>;  // tiles, or "" for the job; and a name
    Graph graph_;
    const Named<TilePlan>& plans_;
    const Named<std::int64_t>& steps_;
    std::optional<std::int64_t> jitter_;
    Named<std::int64_t> grid_writer_;
    std::map<Place, std::int64_t> value_writer_;
    std::map<Place, std::set<std::int64_t>> value_readers_;

    // What follows from the blocks.
    void relate() {
        const auto& passes = graph_.program->passes;
        graph_.of_pass.resize(passes.size());
        graph_.tile_blocks.resize(passes.size());
        graph_.followers.resize(graph_.blocks.size());
        graph_.ranks.assign(graph_.blocks.size(), 0);
        for (const auto& block : graph_.blocks) {
            graph_.of_pass[block.place].push_back(block.number);
            if (block.section != "shared") graph_.tile_blocks[block.place].push_back(block.number);
            for (const auto& wait : block.waits) graph_.followers[wait.block].emplace_back(block.number, wait);
            for (const auto& [grid, read] : block.reads)
                if (read.writer >= 0) graph_.readers[{grid, read.writer}].emplace_back(block.number, read.over);
        }
        for (auto number = graph_.blocks.size(); number-- > 0;) {
            std::int64_t longest = 0;
            for (const auto& [follower, wait] : graph_.followers[number]) longest = std::max(longest, graph_.ranks[follower]);
            graph_.ranks[number] = 1 + longest;
        }
        for (std::size_t place = 0; place < passes.size(); ++place) {
            std::set<std::string>& names = graph_.read_later.emplace_back();
            for (auto later = place + 1; later < passes.size(); ++later) names.merge(passes[later].reads());
        }
    }

    bool writes_grid(const std::set<std::string>& names) const {
        return std::any_of(names.begin(), names.end(), [&](const auto& name) { return graph_.program->grids.count(name) > 0; });
    }

    void pass(std::int64_t place) {
        const Pass& p = graph_.program->passes[place];
        bool joined = writes_grid(p.writes("each"));
        auto first = graph_.blocks.size();
        std::vector<const Call*> shared = p.tiles ? shared_calls(p) : std::vector<const Call*>{}, once;
        if (!shared.empty()) add(place, "shared", 0, shared, {}, -1);
        for (const auto& call : p.once)
            if (std::find(shared.begin(), shared.end(), &call) == shared.end()) once.push_back(&call);
        auto entry = steps_.find(p.name);
        std::int64_t steps = entry == steps_.end() ? 0 : entry->second;
        struct Moment {
            const char* section;
            std::int64_t step;
            std::vector<const Call*> calls;
        };
        auto pointers_to = [](const std::vector<Call>& calls) {
            std::vector<const Call*> pointers;
            pointers.reserve(calls.size());
            for (const auto& call : calls) pointers.push_back(&call);
            return pointers;
        };
        std::vector<Moment> moments;
        if (!once.empty() || !p.state.empty()) moments.push_back({"once", 0, once});
        for (std::int64_t step = 0; step < (p.each.empty() ? 0 : steps); ++step) moments.push_back({"each", step, pointers_to(p.each)});
        if (!p.last.empty()) moments.push_back({"last", std::max<std::int64_t>(0, steps - 1), pointers_to(p.last)});
        auto before = grid_writer_;
        std::int64_t previous = -1;
        for (const auto& moment : moments) {
            auto written = joined ? grid_writer_ : before;
            previous = add(place, moment.section, moment.step, moment.calls, written, previous);
            if (joined)
                for (const auto& grid : graph_.blocks[previous].writes) grid_writer_[grid] = previous;
        }
        if (joined) return;
        for (auto i = first; i < graph_.blocks.size(); ++i)
            for (const auto& grid : graph_.blocks[i].writes) grid_writer_[grid] = graph_.blocks[i].number;
    }

    // The calls of `once` that read nothing of a tile: one run serves all tiles.
    std::vector<const Call*> shared_calls(const Pass& p) const {
        std::set<std::string> of_tiles = key_set(graph_.program->grids);
        for (const auto& [name, state] : p.state) of_tiles.insert(name);
        for (const auto& [key, writer] : value_writer_)
            if (key.first == key_of(p.tiles)) of_tiles.insert(key.second);
        std::vector<const Call*> shared;
        for (const auto& call : p.once) {
            if (call.shared(of_tiles)) {
                shared.push_back(&call);
            } else {
                for (const auto& [name, target] : call.outputs) of_tiles.insert(target);
            }
        }
        return shared;
    }

    std::int64_t add(std::int64_t place, const std::string& section, std::int64_t step, const std::vector<const Call*>& calls,
                     const Named<std::int64_t>& written, std::int64_t previous) {
        const Program& program = *graph_.program;
        const Pass& p = program.passes[place];
        auto number = static_cast<std::int64_t>(graph_.blocks.size());
        bool alone = section == "shared";
        std::set<std::string> names, targets, values;
        for (const Call* call : calls) {
            for (const auto& [name, source] : call->inputs)
                if (source[0] != '#' && source[0] != '$' && source[0] != '~') names.insert(source[0] == '@' ? source.substr(1) : source);
            for (const auto& [name, target] : call->outputs) targets.insert(target);
        }
        bool independent = p.tiles && !p.each.empty() && !writes_grid(p.writes("each"));
        Block block{number, place, section, step, calls, 0, {}, {}, {}, independent, 1, plans_.at(p.name)};
        if (jitter_ && section == "each" && moves(program, p)) block.plan = moved(block.plan, program.multiple_px, *jitter_, step);
        if (previous >= 0) block.waits.push_back({previous, "same", nullptr});
        for (const auto& grid : names) {
            if (!program.grids.count(grid) || grid == "image") continue;
            auto writer = written.find(grid);
            block.reads[grid] = {-1, nullptr};
            if (writer == written.end()) continue;
            auto over = std::make_shared<const Beneath>(rectangles(block.plan), rectangles(graph_.blocks[writer->second].plan));
            block.reads[grid] = {writer->second, over};
            wait(block, {writer->second, "beneath", over});
        }
        Strings scopes = alone || !p.tiles ? Strings{""} : Strings{key_of(p.tiles), ""};
        values = names;
        values.insert(targets.begin(), targets.end());
        for (const auto& name : values) {
            if (program.grids.count(name)) continue;
            for (const auto& scope : scopes) {
                auto writer = value_writer_.find({scope, name});
                if (writer == value_writer_.end()) continue;
                const Block& earlier = graph_.blocks[writer->second];
                if (earlier.place != place || earlier.section == "shared") wait(block, {writer->second, scope.empty() ? "every" : "same", nullptr});
                if (names.count(name)) {
                    value_readers_[{scope, name}].insert(number);
                    break;
                }
            }
        }
        std::set<std::string> renewed = targets;
        if (section == "once")
            for (const auto& [name, state] : p.state) renewed.insert(name);
        for (const auto& name : renewed) {
            if (program.grids.count(name)) continue;
            Place home{scopes[0], name};
            for (auto reader : value_readers_[home])  // they read what is written over now
                if (reader != number && graph_.blocks[reader].place != place) wait(block, {reader, scopes[0].empty() ? "every" : "same", nullptr});
            value_readers_.erase(home);
            value_writer_[home] = number;
        }
        block.size = alone ? 1 : block.plan.count();
        for (const auto& target : targets)
            if (program.grids.count(target)) block.writes.push_back(target);
        block.batch = alone || !p.tiles ? 1 : p.tiles->batch;
        graph_.blocks.push_back(std::move(block));
        return number;
    }

    static void wait(Block& block, Wait wait) {
        for (const auto& other : block.waits)
            if (other.block == wait.block && other.rule == wait.rule) return;
        block.waits.push_back(std::move(wait));
    }
};

}  // namespace

Rectangles rectangles(const TilePlan& plan) {
    Rectangles all;
    for (auto top : plan.tops) all.rows.push_back({top, top + plan.tile_height});
    for (auto left : plan.lefts) all.columns.push_back({left, left + plan.tile_width});
    return all;
}

Rectangles regions(const TilePlan& plan) {
    auto between = [](const Shape& starts, std::int64_t end) {
        std::vector<Interval> intervals;
        for (std::size_t i = 0; i < starts.size(); ++i) intervals.push_back({starts[i], i + 1 < starts.size() ? starts[i + 1] : end});
        return intervals;
    };
    return {between(plan.tops, plan.height), between(plan.lefts, plan.width)};
}

Beneath::Beneath(const Rectangles& above, const Rectangles& below)
    : rows_(touched(above.rows, below.rows)),
      columns_(touched(above.columns, below.columns)),
      back_rows_(touched(below.rows, above.rows)),
      back_columns_(touched(below.columns, above.columns)) {}

Shape Beneath::product(std::int64_t tile, const std::vector<Interval>& rows, const std::vector<Interval>& columns, std::size_t width) {
    auto [row, column] = std::pair{rows[tile / columns.size()], columns[tile % columns.size()]};
    Shape tiles;
    for (auto r = row.begin; r < row.end; ++r)
        for (auto c = column.begin; c < column.end; ++c) tiles.push_back(r * static_cast<std::int64_t>(width) + c);
    return tiles;
}

std::int64_t Beneath::count(std::int64_t tile, const std::vector<Interval>& rows, const std::vector<Interval>& columns) {
    auto wide = static_cast<std::int64_t>(columns.size());
    const Interval &row = rows[tile / wide], &column = columns[tile % wide];
    return std::max<std::int64_t>(0, row.end - row.begin) * std::max<std::int64_t>(0, column.end - column.begin);
}

Shape Wait::tiles(std::int64_t tile, std::int64_t size) const { return over ? over->below(tile) : rule == "same" ? Shape{tile} : all(size); }

std::int64_t Wait::count(std::int64_t tile, std::int64_t size) const { return over ? over->count_below(tile) : rule == "same" ? 1 : size; }

Shape Wait::followers(std::int64_t tile, std::int64_t size) const { return over ? over->above(tile) : rule == "same" ? Shape{tile} : all(size); }

bool moves(const Program& program, const Pass& p) {
    std::set<std::string> written = p.writes("each");
    return p.tiles && p.state.empty() && std::any_of(written.begin(), written.end(), [&](const auto& name) { return program.grids.count(name) > 0; });
}

Graph lower(const Program& program, const Named<TilePlan>& plans, const Named<std::int64_t>& steps, std::optional<std::int64_t> jitter) {
    return Lowering(program, plans, steps, jitter).graph();
}

}  // namespace tw
