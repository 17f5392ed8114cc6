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

   private:
    std::vector<Interval> rows_, columns_, back_rows_, back_columns_;
    static Shape product(std::int64_t tile, const std::vector<Interval>& rows, const std::vector<Interval>& columns, std::size_t width);
};

struct Wait {
    std::int64_t block;
    std::string rule;  // same | every | beneath
    std::shared_ptr<const Beneath> over;

    Shape tiles(std::int64_t tile, std::int64_t size) const;
};

struct Block {
    std::int64_t number, place;
    std::string section;  // shared | once | each | last
    std::int64_t step;
    std::vector<const Call*> calls;
    std::int64_t size;
    std::vector<Wait> waits;
    Named<std::int64_t> reads;  // grid -> the block that wrote it; -1: its initial values
    Strings writes;
    std::int64_t batch;
};

struct Graph {
    const Program* program;
    Named<TilePlan> plans;
    std::vector<Block> blocks;
    Named<std::int64_t> last_writer;

    const Pass& pass(const Block& block) const { return program->passes[block.place]; }
    const TilePlan& plan(const Block& block) const { return plans.at(pass(block).name); }
};

// The program must outlive the graph.
Graph lower(const Program& program, const Named<TilePlan>& plans, const Named<std::int64_t>& steps);

}  // namespace tw
