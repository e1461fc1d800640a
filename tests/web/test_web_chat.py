"""The chat page: streaming, stopping, regenerating, editing, settings, errors in the server's words."""

from __future__ import annotations

import json
from pathlib import Path

from playwright.sync_api import expect

from llmkit_chat.conversation import Conversation

LONG = "slowly " + "word " * 400


def test_an_answer_is_streamed_as_markdown(open_page):
    chat = open_page()
    chat.send("slowly Some **bold** words\n\n```python\nprint(1)\n```\nand the end")
    expect(chat.last).to_contain_text("Some")
    assert "the end" not in chat.last.inner_text()  # it is there before it is complete
    chat.wait()
    expect(chat.last.locator("strong")).to_have_text("bold")
    expect(chat.last.locator("pre code")).to_have_text("print(1)")
    expect(chat.last).to_contain_text("and the end")
    chat.last.get_by_role("button", name="Copy code").click()
    expect(chat.page.locator("#announce")).to_have_text("Copied")


def test_stop_keeps_what_has_come_and_tells_the_server(open_page):
    chat = open_page()
    chat.send(LONG)
    expect(chat.last).to_contain_text("word word")
    chat.button("Stop").click()
    expect(chat.answers.last).to_contain_text("Stopped.")
    text = chat.last.inner_text()
    assert 8 < len(text) < 1500
    chat.ask("say next")  # the server is not busy with the rest of 40 seconds
    expect(chat.last).to_have_text("next")
    assert chat.answers.first.locator(".text").inner_text() == text
    chat.send(LONG)
    expect(chat.last).to_contain_text("word")
    chat.page.keyboard.press("Escape")
    expect(chat.answers.last).to_contain_text("Stopped.")


def test_regenerate_and_edit_replace_what_comes_after(open_page):
    chat = open_page()
    chat.ask("say one")
    chat.ask("say two")
    chat.button("Regenerate").click()
    chat.wait()
    expect(chat.answers).to_have_count(2)
    expect(chat.last).to_have_text("two")
    first = chat.questions.first
    first.hover()
    first.get_by_role("button", name="Edit").click()
    first.get_by_label("Edit the message").fill("say three")
    first.get_by_label("Edit the message").press("Escape")
    expect(first).to_contain_text("say one")
    first.get_by_role("button", name="Edit").click()
    first.get_by_label("Edit the message").fill("prompt?")
    first.get_by_role("button", name="Send").click()
    chat.wait()
    expect(chat.answers).to_have_count(1)
    expect(chat.last).to_have_text("<user>prompt?<assistant>")


def test_the_model_gets_the_system_prompt_and_the_whole_conversation(open_page):
    chat = open_page()
    chat.page.get_by_text("System prompt").click()
    chat.page.get_by_label("System prompt").fill("Be brief.")
    chat.ask("say one")
    chat.ask("prompt?")
    expect(chat.last).to_have_text("<system>Be brief.<user>say one<assistant>one<user>prompt?<assistant>")


def test_settings_are_sent_and_kept(open_page):
    chat = open_page()
    chat.button("Settings").click()
    chat.page.get_by_label("Temperature").fill("0.25")
    chat.page.get_by_label("Top k").fill("7")
    chat.page.get_by_label("Longest answer").fill("60")
    chat.button("Done").click()
    chat.page.reload()
    chat.ask("sampling?")
    expect(chat.last).to_have_text("temperature 0.25, top_k 7, max_tokens 60")
    chat.ask("say " + "long " * 20)
    expect(chat.answers.last).to_contain_text("Cut off")
    chat.button("Settings").click()
    chat.button("Reset").click()
    chat.button("Done").click()
    chat.ask("sampling?")
    expect(chat.last).to_contain_text("temperature 0.8, top_k 0")


def test_a_conversation_that_grows_too_long_loses_its_beginning_and_says_so(open_page):
    chat = open_page(may_fail=True)
    chat.choose("narrow")
    chat.ask("say " + "a" * 40)
    chat.ask("say " + "b" * 40)
    expect(chat.answers.last).to_contain_text("the oldest 2 messages are left out")
    expect(chat.last).to_have_text("b" * 40)
    chat.ask("say " + "c" * 300)  # this one alone is too long: the server's own words
    expect(chat.answers.last.get_by_role("alert")).to_contain_text("maximum context length is 160 tokens")
    expect(chat.answers.last).not_to_contain_text("left out")


def test_conversations_are_kept_listed_renamed_exported_and_deleted(open_page, tmp_path: Path):
    chat = open_page()
    chat.ask("say one")
    chat.button("New chat").click()
    expect(chat.answers).to_have_count(0)
    chat.ask("say two")
    chat.page.reload()
    expect(chat.last).to_have_text("two")
    items = chat.page.locator("#conversations li")
    expect(items).to_have_count(2)
    chat.button("say one").click()
    expect(chat.last).to_have_text("one")

    chat.button("More for say one").click()
    chat.page.get_by_role("menuitem", name="Rename").click()
    chat.page.get_by_label("Name of the conversation").fill("The <b>first</b>")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("h1")).to_have_text("The <b>first</b>")
    chat.button("More for The <b>first</b>").click()
    with chat.page.expect_download() as download:
        chat.page.get_by_role("menuitem", name="Export").click()
    download.value.save_as(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text())["model"] == "talker"
    loaded = Conversation.load(tmp_path / "talk.json")  # as `llmkit chat --load` does
    assert [turn["content"] for turn in loaded.turns] == ["say one", "one"]

    chat.button("More for The <b>first</b>").click()
    chat.page.get_by_role("menuitem", name="Delete").click()
    expect(items).to_have_count(1)
    chat.page.reload()
    expect(items).to_have_count(1)
    chat.button("More for say two").click()
    chat.page.get_by_role("menuitem", name="Delete").click()
    expect(items).to_have_count(0)
    chat.button("Undo").click()
    expect(items).to_have_count(1)
    expect(chat.last).to_have_text("two")


def test_an_answer_goes_on_while_another_conversation_is_shown(open_page):
    chat = open_page()
    chat.send("slowly " + "word " * 30 + "end")
    expect(chat.last).to_contain_text("word")
    chat.button("New chat").click()
    expect(chat.answers).to_have_count(0)
    chat.page.locator("#conversations li .choose").click()
    expect(chat.last).to_contain_text("word end")


def test_the_text_that_came_before_the_connection_was_lost_is_kept(open_page, serve, models):
    other = serve(models["talker"])
    chat = open_page(other.url, may_fail=True)
    chat.send(LONG)
    expect(chat.last).to_contain_text("word word")
    other.process.kill()
    alert = chat.answers.last.get_by_role("alert")
    expect(alert).to_contain_text("in the middle of the answer")
    assert "word word" in chat.last.inner_text()
    chat.button("Try again").click()
    expect(alert).to_contain_text("The server cannot be reached.")
    assert "Traceback" not in chat.page.content()


def test_an_error_within_a_stream_is_shown_in_the_servers_words(open_page):
    chat = open_page()
    events = (
        '{"choices": [{"delta": {"content": "So far"}}]}',
        '{"error": {"message": "The engine failed.", "code": null}}',
    )
    body = "".join(f"data: {event}\r\n\r\n" for event in events)
    chat.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    chat.ask("say x")
    expect(chat.last).to_have_text("So far")
    expect(chat.answers.last.get_by_role("alert")).to_have_text("The engine failed.")


def test_a_key_is_asked_for_where_the_server_wants_one(open_page, serve, models):
    other = serve(models["talker"], LLMKIT_API_KEYS="sesame")
    chat = open_page(other.url, may_fail=True)
    key = chat.page.get_by_role("dialog").get_by_label("API key")
    key.fill("wrong")
    key.press("Enter")
    expect(chat.page.get_by_role("alert").filter(has_text="key")).to_be_visible()
    key.fill("sesame")
    key.press("Enter")
    chat.ask("say come in")
    expect(chat.last).to_have_text("come in")


def test_a_base_model_gets_a_page_to_write_on(open_page):
    chat = open_page()
    chat.choose("writer")
    text = chat.page.get_by_label("Text to continue")
    text.fill("Once upon a time")
    text.press("Control+Enter")
    expect(text).to_have_value("Once upon a time and so on.")
    expect(chat.page.locator("mark")).to_have_text(" and so on.")
    chat.button("Undo").click()
    expect(text).to_have_value("Once upon a time")
    chat.page.get_by_role("button", name="Continue").click()
    expect(text).to_have_value("Once upon a time and so on.")
    expect(chat.page.get_by_text("The model ended the text here.")).to_be_visible()
    chat.page.reload()
    expect(text).to_have_value("Once upon a time and so on.")
    chat.choose("talker")  # a chat model begins a chat; the text is still in the list
    expect(chat.input).to_be_visible()
    chat.button("Once upon a time and so on.").click()
    expect(text).to_have_value("Once upon a time and so on.")
