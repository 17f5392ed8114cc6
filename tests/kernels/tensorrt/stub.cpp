// What TensorRT's Python bindings look for when they are imported, in a library that can do nothing: there is a registry,
// and whatever is asked of it is done at once. Compiled as libnvinfer, libnvinfer_plugin and libnvonnxparser.
namespace {
void* nothing() { return nullptr; }
using Method = void* (*)();
constexpr int methods = 64;
struct Registry {
    const Method* table;
    Method entries[methods];
    Registry() : table(entries) {
        for (Method& entry : entries) entry = nothing;
    }
} registry;
}  // namespace

extern "C" {
void* getPluginRegistry() { return &registry; }
void* getBuilderPluginRegistry() { return &registry; }
void* createInferBuilder_INTERNAL() { return nullptr; }
void* createInferRefitter_INTERNAL() { return nullptr; }
void* createInferRuntime_INTERNAL() { return nullptr; }
void* createNvOnnxParser_INTERNAL() { return nullptr; }
void* createNvOnnxParserRefitter_INTERNAL() { return nullptr; }
int getNvOnnxParserVersion() { return 0; }
bool initLibNvInferPlugins() { return true; }
}
