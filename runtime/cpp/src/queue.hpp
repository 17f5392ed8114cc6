// Which node runs next: the nodes that are ready, in the order of their longest path to the end. No threads.
// As runtime/execute/queue.py, for one job.
#pragma once

#include "lower.hpp"

namespace tw {

constexpr std::size_t LANES = 2;  // batches that a device has at once: one runs while the next is prepared

struct Node {
    std::int64_t block, tile;

    bool operator<(const Node& other) const { return std::pair(block, tile) < std::pair(other.block, other.tile); }
};

// Nodes that one call of an engine takes together.
struct Batch {
    std::vector<Node> nodes;
    std::size_t device;
};

// What devices have shown they can do, over all jobs.
struct Devices {
    std::size_t count;
    std::set<std::size_t> retired;                                          // those that failed
    std::map<std::pair<std::size_t, std::string>, std::int64_t> most;       // device, component -> nodes that its memory has room for
};

class Queue {
   public:
    // `runs`: the blocks that run. `pass_by_pass`: a pass begins only when the one before it has ended.
    Queue(const Graph& graph, const std::vector<bool>& runs, Devices& devices, bool pass_by_pass);

    // The nodes that a device runs next; none if no node is ready, or if other devices need them more.
    std::optional<Batch> take(std::size_t device);
    void complete(const Batch& batch);
    void put_back(const Batch& batch);  // they did not end
    bool done() const;
    bool pass_done(std::int64_t place) const;
    std::int64_t left(std::int64_t block) const { return todo_[block]; }

   private:
    using Key = std::pair<std::int64_t, std::string>;           // nodes of the same key may share a call
    using Entry = std::tuple<std::int64_t, std::int64_t, std::int64_t>;  // minus the rank, tile, block
    const Graph& graph_;
    std::vector<bool> runs_;
    Devices& devices_;
    bool pass_by_pass_;
    std::vector<Shape> waits_;  // block -> tile -> nodes that it waits for
    Shape todo_;                // block -> nodes that are not done
    std::map<Key, std::set<Entry>> ready_;
    std::map<std::int64_t, std::set<Entry>> postponed_;  // pass -> tiles that may not begin yet
    Shape open_;                                         // pass -> tiles that are begun and not finished
    std::vector<std::size_t> busy_;                      // device -> batches that it runs or prepares
    std::size_t waiting_ = 0;                            // nodes that are ready

    Entry entry(const Node& node) const { return {-graph_.ranks[node.block], node.tile, node.block}; }
    bool allowed(const Key& key) const;
    void offer(const Node& node);
    void finish(const Block& block);
    void push(const Node& node);
};

}  // namespace tw
