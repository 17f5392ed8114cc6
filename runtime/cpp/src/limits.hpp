// What a record of a document may hold, beyond its types. In the words of check_limits in runtime/bundle/strict.py.
#pragma once

#include "documents.hpp"

namespace tw {

// Each throws Invalid.
void limits(const TensorSpec& record);
void limits(const Grid& record);
void limits(const State& record);
void limits(const Input& record);
void limits(const Text& record);
void limits(const Tiles& record);
void limits(const Steps& record);
void limits(const Program& record);
void limits(const File& record);
void limits(const Memory& record);
void limits(const Needs& record);
void limits(const Range& record);
void limits(const Profile& record);
void limits(const Form& record);
void limits(const EngineSpec& record);
void limits(const Component& record);
void limits(const Argument& record);
void limits(const Manifest& record);
void limits(const Reference& record);

}  // namespace tw
