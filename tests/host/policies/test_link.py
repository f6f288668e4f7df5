import pytest

from moeaccel.host.policies.link import Background, Move


def queue(*moves):
    link = Background()
    for layer, expert, guess in moves:
        (link.guesses if guess else link.promotions).append(Move(layer, expert, guess=guess))
    return link


def arrived(link, images, wanted=lambda move: True):
    return [(move.layer, move.expert) for move in link.advance(images, wanted)]


def test_guesses_go_first_and_images_arrive_whole():
    link = queue((0, 1, False), (1, 2, True), (1, 3, True))
    assert arrived(link, 0.75) == [] and len(link) == 3
    assert arrived(link, 0.5) == [(1, 2)]
    assert arrived(link, 1.75) == [(1, 3), (0, 1)]
    assert link.moved == pytest.approx(3) and link.wasted == 0 and not len(link)


def test_what_the_route_does_not_hold_is_cancelled():
    link = queue((1, 2, True), (1, 3, True), (2, 4, True))
    link.advance(0.5, lambda move: True)
    needed = link.take(1, lambda expert: expert == 3)
    assert [(move.expert, move.left) for move in needed] == [(3, 1.0)]
    assert link.wasted == pytest.approx(0.5) and [m.expert for m in link.guesses] == [4]


def test_a_promotion_that_lost_its_place_is_dropped():
    link = queue((0, 1, False), (0, 2, False))
    link.advance(0.25, lambda move: True)
    assert arrived(link, 1.0, lambda move: move.expert == 2) == [(0, 2)]
    assert link.moved == pytest.approx(1.25) and link.wasted == pytest.approx(0.25)
