// The plugin without TensorRT: the shapes and types that a builder and a context ask of it.
// Run by test_tensorrt_plugin.py.
#include "tensorrt_plugin.h"

namespace {

struct Number final : apiv::VDimensionExpr {
    explicit Number(int64_t value) : value(value) {}
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
    int64_t value;
};

struct Expression final : IDimensionExpr {
    explicit Expression(int64_t value) : number(value) { mImpl = &number; }
    Number number;
};

struct Numbers final : apiv::VExprBuilder {
    const IDimensionExpr* constant(int64_t value) override {
        made.push_back(std::make_unique<Expression>(value));
        return made.back().get();
    }
    const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&,
                                    const IDimensionExpr&) override {
        return nullptr;
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                            const IDimensionExpr&) override {
        return nullptr;
    }
    std::vector<std::unique_ptr<Expression>> made;
};

struct Builder final : IExprBuilder {
    Builder() { mImpl = &numbers; }
    Numbers numbers;
};

void test_shapes() {
    const auto plugin = create(Fields().list());
    Builder builder;
    std::vector<DimsExprs> in, out(kOutputs);
    const std::vector<Tensor> all = tensors(DataType::kHALF);
    for (int32_t i = 0; i < kInputs; ++i) {
        DimsExprs one = {};
        one.nbDims = static_cast<int32_t>(all[i].shape.size());
        for (int32_t axis = 0; axis < one.nbDims; ++axis)
            one.d[axis] = builder.constant(all[i].shape[axis]);
        in.push_back(one);
    }
    IPluginV3OneBuildV2* const b = build(*plugin);
    CHECK(b->getNbOutputs() == kOutputs);
    CHECK(!b->getOutputShapes(in.data(), kInputs, nullptr, 0, out.data(), kOutputs, builder));
    for (int32_t i = 0; i < kOutputs; ++i) {
        const std::vector<int64_t>& wanted = all[kInputs + i].shape;
        CHECK(out[i].nbDims == static_cast<int32_t>(wanted.size()));
        for (size_t axis = 0; axis < wanted.size(); ++axis)
            CHECK(out[i].d[axis]->getConstantValue() == wanted[axis]);
    }
    CHECK(b->getOutputShapes(in.data(), kInputs - 1, nullptr, 0, out.data(), kOutputs, builder));
    CHECK(b->getAliasedInput(0) == -1);
    for (int32_t i = 1; i < kOutputs; ++i) CHECK(b->getAliasedInput(i) == 8 + i);
}

void test_types() {
    const auto plugin = create(Fields().list());
    IPluginV3OneBuildV2* const b = build(*plugin);
    for (const DataType real : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        std::vector<DynamicPluginTensorDesc> all = described(tensors(real));
        std::vector<DataType> in, out(kOutputs);
        for (int32_t i = 0; i < kInputs; ++i) in.push_back(all[i].desc.type);
        CHECK(!b->getOutputDataTypes(out.data(), kOutputs, in.data(), kInputs));
        for (int32_t i = 0; i < kInputs + kOutputs; ++i) {
            if (i >= kInputs) CHECK(out[i - kInputs] == all[i].desc.type);
            CHECK(b->supportsFormatCombination(i, all.data(), kInputs, kOutputs));
            const PluginTensorDesc kept = all[i].desc;
            all[i].desc.type = DataType::kUINT8;
            CHECK(!b->supportsFormatCombination(i, all.data(), kInputs, kOutputs));
            all[i].desc = kept;
            all[i].desc.format = TensorFormat::kHWC8;
            CHECK(!b->supportsFormatCombination(i, all.data(), kInputs, kOutputs));
            all[i].desc = kept;
        }
        all[1].desc.type = real == DataType::kHALF ? DataType::kFLOAT : DataType::kHALF;
        CHECK(!b->supportsFormatCombination(1, all.data(), kInputs, kOutputs));
    }
}

void test_shapes_that_do_not_fit() {
    const auto plugin = create(Fields().list());
    const std::vector<Tensor> good = tensors(DataType::kHALF);
    const auto configured = [&](const std::vector<Tensor>& tensors) {
        const auto all = described(tensors);
        std::vector<PluginTensorDesc> plain;
        for (const DynamicPluginTensorDesc& one : all) plain.push_back(one.desc);
        const int32_t first =
            build(*plugin)->configurePlugin(all.data(), kInputs, all.data() + kInputs, kOutputs);
        CHECK(first == runtime(*plugin)->onShapeChange(plain.data(), kInputs,
                                                       plain.data() + kInputs, kOutputs));
        return first == 0;
    };
    CHECK(configured(good));
    std::vector<Tensor> dynamic = good;
    for (const int32_t i : {0, 1, 2, 3}) dynamic[i].shape[1] = -1;
    dynamic[6].shape[1] = -1;
    CHECK(configured(dynamic));
    for (int32_t i = 0; i < kInputs; ++i) {
        std::vector<Tensor> bad = good;
        bad[i].shape.back() += 1;
        CHECK(configured(bad) == (i == 6));  // a block table may be of any length
        bad[i].shape.push_back(1);
        bad[i].shape[bad[i].shape.size() - 2] -= i < 9 ? 1 : 0;
        CHECK(!configured(bad));
    }
}

}  // namespace

int main() {
    test_shapes();
    test_types();
    test_shapes_that_do_not_fit();
    std::printf("ok\n");
}
