#include "queue.hpp"

#include <algorithm>

namespace tw {

Queue::Queue(const Graph& graph, const std::vector<bool>& runs, Devices& devices, bool pass_by_pass)
    : graph_(graph), runs_(runs), devices_(devices), pass_by_pass_(pass_by_pass), waits_(graph.blocks.size()), todo_(graph.blocks.size()),
      open_(graph.program->passes.size()), busy_(devices.count) {
    for (const auto& block : graph.blocks) {
        if (!runs[block.number]) continue;
        todo_[block.number] = block.size;
        Shape& waits = waits_[block.number];
        waits.assign(block.size, 0);
        for (const auto& wait : block.waits)
            for (std::int64_t tile = 0; runs[wait.block] && tile < block.size; ++tile) waits[tile] += wait.count(tile, graph.blocks[wait.block].size);
    }
    for (const auto& block : graph.blocks)
        for (std::int64_t tile = 0; tile < static_cast<std::int64_t>(waits_[block.number].size()); ++tile)
            if (!waits_[block.number][tile]) offer({block.number, tile});
}

std::optional<Batch> Queue::take(std::size_t device) {
    // a busy device prepares a batch only if enough nodes are left for the others, which may soon be idle
    if (devices_.retired.count(device) || (busy_[device] && waiting_ < devices_.count - devices_.retired.size())) return std::nullopt;
    auto best = ready_.end();
    for (auto entry = ready_.begin(); entry != ready_.end(); ++entry)
        if (allowed(entry->first) && (best == ready_.end() || *entry->second.begin() < *best->second.begin())) best = entry;
    if (best == ready_.end()) return std::nullopt;
    const Block& block = graph_.blocks[std::get<2>(*best->second.begin())];
    std::int64_t most = block.batch;
    for (const Call* call : block.calls)
        if (auto room = devices_.most.find({device, call->run}); room != devices_.most.end()) most = std::min(most, room->second);
    // the call that runs now may make more nodes ready for the batch
    if (busy_[device] && static_cast<std::int64_t>(best->second.size()) < most) return std::nullopt;
    Batch batch{{}, device};
    while (static_cast<std::int64_t>(batch.nodes.size()) < most && !best->second.empty()) {
        auto [rank, tile, number] = *best->second.begin();
        best->second.erase(best->second.begin());
        batch.nodes.push_back({number, tile});
        --waiting_;
    }
    if (best->second.empty()) ready_.erase(best);
    ++busy_[device];
    return batch;
}

void Queue::complete(const Batch& batch) {
    --busy_[batch.device];
    for (const auto& node : batch.nodes) {
        --todo_[node.block];
        finish(graph_.blocks[node.block]);
        for (const auto& [number, wait] : graph_.followers[node.block]) {
            if (!runs_[number]) continue;
            for (auto tile : wait.followers(node.tile, static_cast<std::int64_t>(waits_[number].size())))
                if (--waits_[number][tile] == 0) offer({number, tile});
        }
    }
}

void Queue::put_back(const Batch& batch) {
    --busy_[batch.device];
    for (const auto& node : batch.nodes) push(node);
}

bool Queue::done() const {
    return std::all_of(todo_.begin(), todo_.end(), [](std::int64_t left) { return left == 0; });
}

bool Queue::pass_done(std::int64_t place) const {
    const Shape& blocks = graph_.of_pass[place];
    return std::all_of(blocks.begin(), blocks.end(), [&](std::int64_t number) { return todo_[number] == 0; });
}

bool Queue::allowed(const Key& key) const {
    if (!pass_by_pass_) return true;
    std::int64_t place = graph_.blocks[std::get<2>(*ready_.at(key).begin())].place;
    return std::all_of(graph_.blocks.begin(), graph_.blocks.end(), [&](const Block& block) { return block.place >= place || !todo_[block.number]; });
}

// In a pass whose tiles do not read each other only a few tiles are open at a time, so that memory does not grow with the image.
void Queue::offer(const Node& node) {
    const Block& block = graph_.blocks[node.block];
    if (block.independent && block.number == graph_.tile_blocks[block.place].front()) {
        if (open_[block.place] >= static_cast<std::int64_t>(2 * LANES * devices_.count - 2) * block.batch) {
            postponed_[block.place].insert(entry(node));
            return;
        }
        ++open_[block.place];
    }
    push(node);
}

// Lets the next tile of such a pass begin where one has ended.
void Queue::finish(const Block& block) {
    if (!block.independent || block.number != graph_.tile_blocks[block.place].back()) return;
    --open_[block.place];
    auto& postponed = postponed_[block.place];
    if (postponed.empty()) return;
    auto [rank, tile, number] = *postponed.begin();
    postponed.erase(postponed.begin());
    ++open_[block.place];
    push({number, tile});
}

void Queue::push(const Node& node) {
    const Block& block = graph_.blocks[node.block];
    bool alone = !graph_.pass(block).tiles || block.section == "shared";
    ready_[alone ? Key{block.number, "alone"} : Key{block.place, block.section}].insert(entry(node));
    ++waiting_;
}

}  // namespace tw
