// What a job holds between calls: parts of grids, values of tiles, values of the job. As runtime/memory/held.py.
#pragma once

#include "bundle.hpp"
#include "plan.hpp"

namespace tw {

using Planned = std::pair<const Pass*, TilePlan>;

class Held {
   public:
    Held(const Bundle& bundle, const std::vector<Planned>& passes, std::optional<std::int64_t> steps, std::int64_t devices);

    std::int64_t at(std::size_t place) const;  // the most bytes that are held while a pass runs

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

    std::int64_t scope(const Pass& p) const;
    std::size_t last_reader(const std::string& name, std::size_t place) const;
    std::set<std::string> shared_values(const Pass& p, std::set<std::string>& of_tiles) const;
    std::int64_t part_bytes(const std::string& grid, const TilePlan& plan) const;
    Named<std::int64_t> sizes_of(const Pass& p, const TilePlan& plan);
    Shape shape_of(const std::string& source, std::int64_t its, const TilePlan& plan) const;
};

}  // namespace tw
