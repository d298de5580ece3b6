"""What happens in a cluster, as the page shows it and lets it be changed. The cluster is a stand-in."""

from __future__ import annotations

from pages import shot
from playwright.sync_api import expect


def test_the_heat_map_moves(window, serves):
    with serves() as (_, url):
        page = window.open(url, "cluster")
        canvas = page.locator("canvas")
        expect(canvas).to_have_attribute("aria-label", "Heat of 64 experts in 4 layers")
        before, picture = canvas.get_attribute("data-hot"), canvas.screenshot()
        expect(canvas).not_to_have_attribute("data-hot", before)
        assert canvas.screenshot() != picture
        page.get_by_label("By heat").check()
        expect(page.locator(".tile").first.locator(".value")).to_contain_text("tokens/s")
        expect(page.locator(".flow-band")).to_have_count(6)


def test_a_shard_says_what_speculation_came_to(window, serves):
    with serves() as (_, url):
        shard = window.open(url, "cluster").locator(".worker.attention").first
        expect(shard).to_contain_text("of drafts right (mtp)70")
        expect(shard).to_contain_text("× the speed without drafts1.31")
        expect(shard.locator(".remark")).to_have_text("80% of first drafts are right")


def test_a_scale_is_planned_carried_out_and_watched(window, serves):
    with serves() as (stand_in, url):
        page = window.open(url, "operate")
        panel = page.get_by_role("region", name="Scale", exact=True)
        expect(panel).to_contain_text("now 3")
        panel.get_by_role("button", name="Expert groups: one more").click()
        panel.get_by_role("button", name="Show the plan").click()
        expect(panel).to_contain_text("start expert-3")
        assert len(stand_in.cluster.groups) == 3
        panel.get_by_role("button", name="Carry it out").click()
        expect(panel.locator(".operation")).to_have_attribute("data-phase", "done")
        expect(panel).to_contain_text("now 4")
        expect(page.locator(".operations").last).to_contain_text("4 expert groups")
        page.get_by_label("Advise").check()
        expect(page.get_by_text("It writes what it would do, and does nothing.")).to_be_visible()
        assert stand_in.cluster.mode == "advise"
        page.get_by_role("checkbox", name="Keep 10.0.0.2 free").check()
        page.get_by_role("region", name="Nodes").get_by_role("button", name="Carry it out").click()
        expect(page.get_by_role("region", name="Nodes")).to_contain_text("kept free")


def test_copies_of_an_expert_by_clicking_it(window, serves):
    with serves() as (stand_in, url):
        page = window.open(url, "cluster")
        expect(page.locator("canvas")).to_have_attribute("aria-label", "Heat of 64 experts in 4 layers")
        page.locator("canvas").click(position={"x": 60, "y": 20})
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("Layer 1, expert 0")
        dialog.get_by_role("button", name="Copies: one more").click()
        dialog.get_by_role("button", name="Carry it out").click()
        expect(dialog.locator(".operation")).to_have_attribute("data-phase", "done")
        expect(dialog).to_contain_text("expert-0, expert-1")
        shot(page, "copies-desktop-light")
        assert stand_in.cluster.placement.holders[0][0] == ("expert-0", "expert-1")


def test_a_worker_that_is_lost_and_one_that_comes_back(window, serves):
    with serves() as (stand_in, url):
        page = window.open(url, "cluster")
        page.locator(".worker.expert").first.wait_for()
        stand_in.cluster.dead["expert-1"] = "its process was killed"
        expect(page.locator(".notice")).to_contain_text("expert-1 is dead: its process was killed")
        expect(page.locator(".worker.lost")).to_have_count(1)
        shot(page, "lost-desktop-light")
        stand_in.cluster.dead.clear()
        expect(page.locator(".worker.lost")).to_have_count(0)
        expect(page.locator(".notice")).to_be_hidden()


def test_a_server_that_goes_away_is_said(window, serves):
    with serves() as (stand_in, url):
        page = window.open(url, "cluster")
        page.locator(".worker.expert").first.wait_for()
        page.route("**/admin/events", lambda route: route.fulfill(status=200, body=""))
        stand_in.ended = True
        expect(page.locator(".notice")).to_contain_text("What is shown is as it was.")
        expect(page.locator(".worker.expert")).to_have_count(3)
