import pytest
import torch

from fedlscl.methods.prompts import MultiGranularityViT, PrefixedViT, PromptedViT, PromptingModule, PromptPool

NUM_CLASSES = 6


def prompted(config):
    return PromptedViT(config, NUM_CLASSES, PromptPool(5, 2, 64, 2))


def prefixed(config):
    return PrefixedViT(config, NUM_CLASSES, (0,), (2,), 2, 2, slots=3)


def granular(config):
    net = MultiGranularityViT(prompted(config), NUM_CLASSES, (2,), 2, hidden=8, num_tasks=2)
    net.task_of_class[torch.arange(NUM_CLASSES)] = 0
    return net


NETS = {
    "prompted": (prompted, None),
    "prefixed": (prefixed, torch.full((NUM_CLASSES,), 1)),
    "granular": (granular, torch.arange(NUM_CLASSES)),
}


@pytest.fixture(params=NETS)
def make_module(request, foundation_config):
    def make(lambda_pull=0.5, **options):
        torch.manual_seed(0)
        build, slots = NETS[request.param]
        return PromptingModule(build(foundation_config), lambda_pull, slot_of_class=slots, **options)

    return make


@pytest.fixture
def batch(batches):
    return next(iter(batches()))


def test_terms_are_cross_entropy_and_the_weighted_mean_match(make_module, batch):
    module = make_module()
    slots = () if module.slot_of_class is None else (module.slot_of_class[batch.labels],)
    output, terms = module.net(batch.images, None, *slots), module.loss(batch)
    torch.testing.assert_close(terms["pull"], -0.5 * output.match.mean())
    expected = torch.nn.functional.cross_entropy(output.logits, batch.labels)
    torch.testing.assert_close(terms["cross_entropy"], expected)


def test_columns_of_other_classes_do_not_count(make_module, batch):
    classes = batch.labels.unique()
    module = make_module(classes=classes)
    module.training_step(batch)["loss"].backward()
    other = [label for label in range(NUM_CLASSES) if label not in classes]
    head = module.net.fine_heads[0][2] if hasattr(module.net, "fine_heads") else module.net.head
    assert not head.weight.grad[other].any() and head.weight.grad[classes].any()


def test_without_lambda_keys_get_no_gradient(make_module, batch):
    module = make_module(lambda_pull=0.0)
    module.training_step(batch)["loss"].backward()
    keys = [p for name, p in module.net.named_parameters() if name.split(".")[-1] in ("keys", "fine_keys")]
    assert keys and all(p.grad is None or not p.grad.any() for p in keys)


def test_the_pull_brings_keys_nearer(make_module, batch):
    module = make_module(lambda_pull=1.0)
    optimizer = torch.optim.Adam(module.net.parameters(), 0.01)
    before = module.loss(batch)["pull"].item()
    for _ in range(5):
        optimizer.zero_grad()
        module.loss(batch)["pull"].backward()
        optimizer.step()
    assert module.loss(batch)["pull"].item() < before


def test_it_trains_under_a_stock_trainer(make_module, batches, stock):
    module = make_module(max_norm=1.0)
    before = {name: p.clone() for name, p in module.net.named_parameters()}
    stock(max_epochs=2).fit(module, batches())
    moved = [name for name, p in module.net.named_parameters() if not torch.equal(p, before[name])]
    assert any("prompts" in name for name in moved) and any("keys" in name for name in moved)
    assert module.net.foundation.vit.blocks[0].attn.qkv.weight.grad is None
