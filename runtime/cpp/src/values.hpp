// What the nodes of a job read and write: parts of grids, values of tiles, values of the job. As runtime/execute/values.py.
//
// No grid is stored as a whole. What is stored are the parts that tiles wrote, each multiplied by its ramps. A crop adds the
// parts that overlap it, in tile order, so the bytes do not depend on which tile finished first. A part is dropped once its
// last reader has run.
#pragma once

#include <mutex>

#include "images.hpp"
#include "lower.hpp"
#include "tensor.hpp"

namespace tw {

// What one node wrote, before it is stored.
struct Outputs {
    Named<Tensor> parts, values;
};

// A row of an input, and whether it belongs to the tile.
struct Fed {
    Tensor value;
    bool of_tile;
};

// Any thread may call these functions.
class Values {
   public:
    // `job`: values of passes without tiles that the caller gives. `runs`: the blocks that run.
    Values(const Graph& graph, const Layout& layout, const Enlarged& image, std::int64_t seed, const Named<Tensor>& constants,
           Named<Tensor> inputs, Named<Tensor> job, const std::vector<bool>& runs);

    // The row [1, ...] behind a source, as docs/program.md spells them.
    Fed feed(const Block& block, std::int64_t tile, const std::string& source, const Outputs& outputs) const;
    // The state that a tile starts its pass with.
    Named<Tensor> begun(const Block& block, std::int64_t tile) const;
    // A part times its tile's ramps, ready to be added; a part that overlaps no other tile stays as it is.
    Tensor weighted(const Block& block, const std::string& grid, std::int64_t tile, const Tensor& part) const;

    // Stores what a node wrote, drops what no node will read, and returns the regions of the result that are final now.
    Shape commit(const Block& block, std::int64_t tile, const Outputs& outputs);
    Tile place_of(std::int64_t region) const;
    Tensor region(std::int64_t region) const;
    void handed_on(std::int64_t region);  // drops the parts that only this region has yet to read

   private:
    const Graph& graph_;
    const Program& program_;
    const Layout& layout_;
    const Enlarged& image_;
    std::int64_t seed_;
    const Named<Tensor>& constants_;
    Named<Tensor> inputs_;
    std::vector<bool> runs_;
    std::int64_t final_;
    Rectangles places_;
    Beneath regions_;
    std::vector<std::int64_t> scope_;    // pass -> the first pass with the same tiles
    std::vector<std::int64_t> planned_;  // block -> the first block of its pass since which the tiles have not moved
    std::map<std::int64_t, Beneath> neighbours_;  // that block -> how its tiles lie over each other

    mutable std::mutex lock_;  // of what follows
    Named<Tensor> job_;
    std::map<std::pair<std::int64_t, std::int64_t>, Named<Tensor>> tiles_;  // scope, tile
    std::map<Written, std::map<std::int64_t, Tensor>> parts_;
    std::map<Written, std::map<std::int64_t, std::int64_t>> uses_;  // tile -> reads that are left
    Shape waiting_;                                                  // region of the result -> parts that it lacks
    using Ramps = std::pair<std::vector<Floats>, std::vector<Floats>>;
    mutable std::map<std::pair<std::int64_t, std::int64_t>, Ramps> ramps_;  // that block, px

    std::optional<Fed> look_up(const Block& block, std::int64_t tile, const std::string& name, const Outputs& outputs) const;
    Fed row(const Block& block, std::int64_t tile, std::string name, const Outputs& outputs) const;
    Tensor noise(const Block& block, std::int64_t tile, const std::string& name, std::int64_t stream) const;
    Tensor initial(const Block& block, std::int64_t tile, const std::string& name) const;
    Tensor crop(const Block& block, std::int64_t tile, const std::string& name) const;
    Tensor gather(const std::string& name, std::int64_t writer, const Tile& rectangle, const Shape& parts) const;
    std::int64_t readers(const Written& written, std::int64_t tile) const;
    void used(const Written& written, std::int64_t tile);
};

}  // namespace tw
