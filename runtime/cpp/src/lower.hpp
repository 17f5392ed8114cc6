// Lowering a program over an image to blocks of nodes, and what each node waits for. As runtime/plan/lower.py.
#pragma once

#include <memory>

#include "plan.hpp"

namespace tw {

struct Interval {
    std::int64_t begin, end;
};

struct Rectangles {
    std::vector<Interval> rows, columns;
};

Rectangles rectangles(const TilePlan& plan);
Rectangles regions(const TilePlan& plan);  // for every tile the part of the image that it is the last to reach

// Which rectangles lie beneath which others: a range of rows times a range of columns.
class Beneath {
   public:
    Beneath(const Rectangles& above, const Rectangles& below);
    Shape below(std::int64_t tile) const { return product(tile, rows_, columns_, back_columns_.size()); }
    Shape above(std::int64_t tile) const { return product(tile, back_rows_, back_columns_, columns_.size()); }
    std::int64_t count_below(std::int64_t tile) const { return count(tile, rows_, columns_); }
    std::int64_t count_above(std::int64_t tile) const { return count(tile, back_rows_, back_columns_); }

   private:
    std::vector<Interval> rows_, columns_, back_rows_, back_columns_;
    static Shape product(std::int64_t tile, const std::vector<Interval>& rows, const std::vector<Interval>& columns, std::size_t width);
    static std::int64_t count(std::int64_t tile, const std::vector<Interval>& rows, const std::vector<Interval>& columns);
};

using Over = std::shared_ptr<const Beneath>;
using Written = std::pair<std::string, std::int64_t>;  // a grid, and the block that wrote it

struct Wait {
    std::int64_t block;
    std::string rule;  // same | every | beneath
    Over over;

    Shape tiles(std::int64_t tile, std::int64_t size) const;      // of the earlier block, which has so many
    std::int64_t count(std::int64_t tile, std::int64_t size) const;
    Shape followers(std::int64_t tile, std::int64_t size) const;  // of the later block, which has so many
};

struct Read {
    std::int64_t writer;  // the block; -1: the initial values
    Over over;            // how the tiles of the reader lie over those of the writer
};

struct Block {
    std::int64_t number, place;
    std::string section;  // shared | once | each | last
    std::int64_t step;
    std::vector<const Call*> calls;
    std::int64_t size;
    std::vector<Wait> waits;
    Named<Read> reads;  // grid -> where it comes from
    Strings writes;
    bool independent;  // its tiles do not read each other
    std::int64_t batch;
    TilePlan plan;
};

struct Graph {
    const Program* program;
    std::vector<Block> blocks;
    Named<std::int64_t> last_writer;
    std::vector<Shape> of_pass, tile_blocks;  // pass -> its blocks; those with a node for each tile
    std::vector<std::vector<std::pair<std::int64_t, Wait>>> followers;  // block -> the later ones that wait for it, and how
    Shape ranks;                                                        // block -> nodes on the longest path to the end
    std::map<Written, std::vector<std::pair<std::int64_t, Over>>> readers;
    std::vector<std::set<std::string>> read_later;  // pass -> the names that later passes read

    const Pass& pass(const Block& block) const { return program->passes[block.place]; }
};

// Whether the tiles of a pass may move: they are joined after every step, and keep no state of their own.
bool moves(const Program& program, const Pass& p);

// The program must outlive the graph. `jitter`: the seed by which tiles move from step to step, in passes where they may.
Graph lower(const Program& program, const Named<TilePlan>& plans, const Named<std::int64_t>& steps, std::optional<std::int64_t> jitter = std::nullopt);

}  // namespace tw
