"""The walk-through with the reference engine; afterwards the cache goes back and forth by every other way in."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from p2pkv.demo.programs import Programs
from p2pkv.demo.setting import INSTANCES, TCP_INSTANCE, tcp_instance_yaml
from p2pkv.demo.walkthrough import JOIN_S, MODEL, Answer, Walkthrough


class ReferenceWalkthrough(Walkthrough):
    """Nodes and engines are `p2pkv` programs."""

    COMPUTED_ANYHOW = 1

    async def _play(self, programs: Programs, configs: tuple[Path, Path]) -> None:
        self._start(programs, configs)
        self._compute(self._prompt)
        self._move_over_http(self._prompt)
        self._compute_for_another_tenant(self._prompt)
        await self._move_back_over_websocket()
        self._start_tcp_instance(programs)
        self._move_over_tcp()
        codes = programs.end_all()
        nodes = [code for name, code in codes.items() if name.startswith("node")]
        self._stage.check("all nodes left the cluster and ended with 0", set(nodes) == {0}, f"exit codes {nodes}")

    def _ask(self, index: int, fields: Mapping[str, object]) -> Answer:
        completion = self._stage.post(f"{self._engines[index]}/v1/completions", fields)
        usage = completion["usage"]
        loaded = usage["prompt_tokens_details"]["cached_tokens"]
        return Answer(completion["choices"][0]["text"], usage["prompt_tokens"] - loaded, loaded)

    # --- programs ---

    def _start(self, programs: Programs, configs: tuple[Path, Path]) -> None:
        self._stage.say("A node for each")
        nodes = [("node", "--config", str(config)) for config in configs]
        self._run(programs, {f"node{number}": arguments for number, arguments in enumerate(nodes, start=1)})
        self._stage.say("An engine for each: a small Llama with random weights, served under the name of a large one")
        engines = [
            ("engine", "--config", str(config), "--port", str(port), "--served-model-name", MODEL)
            for config, port in zip(configs, self._ports.engines, strict=True)
        ]
        self._run(programs, {f"engine{number}": arguments for number, arguments in enumerate(engines, start=1)})

    def _start_tcp_instance(self, programs: Programs) -> None:
        self._stage.say("A third instance, which passes no memory on: what it gets and sends goes over TCP, as between hosts")
        config = self._folder / "instance3.yaml"
        config.write_text(tcp_instance_yaml(self._ports), encoding="utf-8")
        self._show_file(config)
        self._run(programs, {"node3": ("node", "--config", str(config))})

    def _run(self, programs: Programs, commands: Mapping[str, Sequence[str]]) -> None:
        started = []
        for name, arguments in commands.items():
            self._stage.type(f"p2pkv {' '.join(arguments)} &")
            started.append(programs.start(name, arguments))
        for program in started:
            self._stage.show(programs.ready_line(program))

    # --- scenes ---

    async def _move_back_over_websocket(self) -> None:
        self._stage.say("Move it back over instance 1's websocket, and watch")
        door = f"ws://localhost:{self._ports.workers[0]}/control"
        event = await self._stage.converse(door, self._order(self._prompt, *reversed(INSTANCES)))
        self._check_event("the prompt is moved back over the websocket", event, "handoff")
        self._check_holder(INSTANCES[0], self._prompt)
        self._stage.say("Engine 1 has it again")
        self._check_loaded(0, self._prompt)

    def _move_over_tcp(self) -> None:
        self._stage.say("Move it to the third instance, and from there to instance 2")
        for old, new in ((INSTANCES[0], TCP_INSTANCE), (TCP_INSTANCE, INSTANCES[1])):
            # Until the node that answers has met the third instance, it refuses.
            order = self._order(self._prompt, old, new)
            moved = self._stage.post_until(f"{self._nodes}/move", order, lambda body: "event_id" in body, within_s=JOIN_S)
            event = self._stage.get(f"{self._nodes}/events/{moved['event_id']}")
            self._check_event(f"the prompt is moved from {old} to {new}", event, "tcp")
        self._check_holder(INSTANCES[1], self._prompt)
        self._stage.say("Engine 2 answers from what has come over TCP")
        self._check_loaded(1, self._prompt)
