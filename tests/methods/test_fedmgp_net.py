import pytest
import torch

from fedlscl.methods.prompts import MultiGranularityViT, PromptedViT, PromptPool, run_blocks
from fedlscl.nets.vit import foundation

CLOSE = {"rtol": 0, "atol": 1e-5}
CLASSES = 6


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_net(foundation_config):
    def make(blocks=(2, 3, 4), length=3, num_tasks=2):
        torch.manual_seed(0)
        pool = PromptPool(1, 4, foundation(foundation_config).width, 1)
        net = MultiGranularityViT(
            PromptedViT(foundation_config, CLASSES, pool, hidden=8), CLASSES, blocks, length, 8, num_tasks
        )
        net.task_of_class[torch.tensor([0, 1, 4])] = 0
        net.task_of_class[torch.tensor([2, 5])] = 1
        return net

    return make


def test_without_fine_tokens_the_fine_pass_is_the_coarse_one(make_net, images):
    net = make_net(length=0).eval()
    with torch.no_grad():
        assert torch.equal(net(images).features, net.coarse(images).features)


def test_query_is_the_coarse_features_and_the_prefix_that_of_the_nearest_met_class(make_net, images):
    net = make_net().eval()
    output, query = net(images), net.coarse(images).features
    met = [0, 1, 2, 4, 5]
    cosines = torch.cosine_similarity(query[:, None], net.fine_keys[met][None], dim=2)
    assert output.chosen[:, 0].tolist() == [met[i] for i in cosines.argmax(1)]
    torch.testing.assert_close(output.match, cosines.amax(1), **CLOSE)
    entering = net.coarse.embed_with_prompts(images, None)[0]
    x = run_blocks(net.foundation, entering, 0, 6, net.fine(output.chosen[:, 0]))
    torch.testing.assert_close(output.features, net.coarse.prompt_features(x), **CLOSE)


def test_a_class_that_was_never_met_is_never_chosen(make_net, images):
    net = make_net().eval()
    net.fine_keys.data[3] = net.coarse(images).features[0].detach()
    assert 3 not in net(images).chosen


def test_images_match_each_on_its_own(make_net, images):
    net = make_net().eval()
    net.fine_keys.data[[1, 5]] = net.coarse(images).features[[0, 3]].detach()
    together = net(images)
    assert together.chosen[[0, 3], 0].tolist() == [1, 5]
    for i in range(len(images)):
        alone = net(images[i : i + 1])
        assert torch.equal(alone.chosen[0], together.chosen[i])
        torch.testing.assert_close(alone.logits[0], together.logits[i], **CLOSE)


def test_a_logit_comes_from_the_head_of_its_task(make_net, images):
    net = make_net().eval()
    output = net(images)
    for label, task in {0: 0, 1: 0, 4: 0, 2: 1, 5: 1}.items():
        torch.testing.assert_close(output.logits[:, label], net.fine_heads[task](output.features)[:, label])


def test_only_fine_prompts_of_classes_in_the_batch_get_a_gradient(make_net, images):
    net = make_net()
    output = net(images, slots=torch.tensor([1, 4, 4, 1, 4]))
    (output.logits[:, [0, 1, 4]].square().sum() - output.match.sum()).backward()
    expected = [False, True, False, False, True, False]
    assert net.fine.prompts.grad.transpose(0, 2).flatten(1).any(1).tolist() == expected
    assert net.fine_keys.grad.any(1).tolist() == expected
    assert all(p.grad is None for p in net.coarse.parameters())
    assert not any(p.grad.any() for p in net.fine_heads[1].parameters())
    assert any(p.grad.any() for p in net.fine_heads[0].parameters())


def test_cached_prefix_changes_nothing(make_net, images):
    net = make_net().eval()
    cached, direct = vars(net(images, net.frozen_prefix(images))), vars(net(images))
    assert all(torch.equal(cached[name], direct[name]) for name in direct)


def test_bf16_trains(make_net, images):
    net = make_net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(images, slots=torch.tensor([0, 1, 2, 4, 5]))
    (output.logits.float().square().sum() - output.match.sum()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    assert net.fine.prompts.grad.any() and net.fine_keys.grad.any()


def test_state_holds_every_class_s_task_and_loads_back(make_net, images):
    net, other = make_net(), make_net()
    other.task_of_class.fill_(-1)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(images).logits, net.eval()(images).logits)
    assert not any("vit" in name or "foundation" in name for name in net.state_dict())


def test_head_is_the_shared_one(make_net):
    net = make_net()
    assert net.head is net.coarse.head and len(net.head.weight) == CLASSES


def test_no_block_is_refused_in_one_line(make_net):
    with pytest.raises(ValueError, match=r"^fine_blocks must name at least one block, got none\.$"):
        make_net(blocks=())
