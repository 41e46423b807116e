// The plugin without TensorRT: its creators, and its attributes there and back.
// Run by test_tensorrt_plugin.py.
#include "tensorrt_plugin.h"

namespace {

std::map<std::string, std::string> bytes_of(const PluginFieldCollection& fields) {
    std::map<std::string, std::string> found;
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        const PluginField& one = fields.fields[i];
        const size_t width = one.type == PluginFieldType::kCHAR ? 1 : 4;
        found[one.name] = std::string(static_cast<const char*>(one.data), width * one.length);
    }
    return found;
}

void test_creators() {
    const char* const namespaces[] = {"ai.mla_deploy", ""};
    for (int32_t i = 0; i < 2; ++i) {
        CHECK(std::string(creator(i)->getPluginName()) == "LatentAttention");
        CHECK(std::string(creator(i)->getPluginVersion()) == "1");
        CHECK(std::string(creator(i)->getPluginNamespace()) == namespaces[i]);
        const PluginFieldCollection* names = creator(i)->getFieldNames();
        const Fields fields;
        const std::vector<PluginField> mine = fields.list();
        CHECK(names->nbFields == static_cast<int32_t>(mine.size()));
        for (const PluginField& one : mine) {
            bool is_there = false;
            for (int32_t k = 0; k < names->nbFields; ++k)
                is_there |= std::string(names->fields[k].name) == one.name &&
                            names->fields[k].type == one.type;
            CHECK(is_there);
        }
    }
}

void test_round_trip() {
    const auto plugin = create(Fields().list());
    CHECK(plugin);
    CHECK(std::string(core(*plugin)->getPluginNamespace()) == "ai.mla_deploy");
    const PluginFieldCollection* stored = runtime(*plugin)->getFieldsToSerialize();
    const auto wanted = bytes_of(*stored);
    CHECK(wanted.size() == Fields().list().size());
    CHECK(wanted.at("cache_format") == "int4");
    const std::unique_ptr<IPluginV3> again(
        creator(1)->createPlugin("layer", stored, TensorRTPhase::kRUNTIME));
    CHECK(again);
    CHECK(bytes_of(*runtime(*again)->getFieldsToSerialize()) == wanted);
    CHECK(std::string(core(*again)->getPluginNamespace()).empty());
    const std::unique_ptr<IPluginV3> copy(plugin->clone());
    CHECK(bytes_of(*runtime(*copy)->getFieldsToSerialize()) == wanted);
    const std::unique_ptr<IPluginV3> attached(runtime(*plugin)->attachToContext(nullptr));
    CHECK(bytes_of(*runtime(*attached)->getFieldsToSerialize()) == wanted);
}

void test_fields_that_do_not_fit() {
    Fields fields;
    fields.strings["cache_format"] = std::string("int4\0", 5);  // with its final zero
    CHECK(create(fields.list()));
    fields.strings["cache_format"] = "int3";
    CHECK(!create(fields.list()));
    const Fields good;
    fields = good;
    fields.strings["mode"] = "both";
    CHECK(!create(fields.list()));
    fields = good;
    fields.ints["kv_lora_rank"] = 320;
    CHECK(!create(fields.list()));
    std::vector<PluginField> list = good.list();
    list[0].type = PluginFieldType::kINT64;
    CHECK(!create(list));
    list = good.list();
    list.pop_back();
    CHECK(!create(list));
}

}  // namespace

int main() {
    test_creators();
    test_round_trip();
    test_fields_that_do_not_fit();
    std::printf("ok\n");
}
