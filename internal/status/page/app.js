// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The live status page of async_proxy. It receives a snapshot every second as a
// server-sent event, and shows it.

import { $, note, seconds, setAttribute, setText, short, span } from "./base.js"
import { updateCharts } from "./charts.js"
import { clients, showClients } from "./clients.js"
import * as hour from "./history.js"
import { listPolicies, showPolicyHead } from "./policies.js"
import { refusals, showRefusals } from "./refusals.js"
import { RECENT, showTiles } from "./tiles.js"
import { histogram, learn, mean, quantile, samples } from "./samples.js"
import { showSettings } from "./settings.js"
import { age, state } from "./state.js"
import { showTargets, targets } from "./targets.js"
import { showTunnels, tunnels } from "./tunnels.js"
import { showWarnings } from "./warnings.js"

// ---- Tables

function showTables() {
	listPolicies()
	showClients()
	showTunnels()
	showRefusals()
	showTargets()
	for (const table of [clients, tunnels]) table.heads.at(-1).hidden = !state.canAct
	for (const table of [clients, tunnels, refusals]) showPolicyHead(table)
}

for (const table of [clients, tunnels, refusals, targets]) table.onChange = () => state.snapshot && showTables()
for (const id of ["clients-filter", "clients-limited", "tunnels-filter", "refusals-filter", "policy"]) {
	$(id).addEventListener("input", () => {
		for (const table of [clients, tunnels, refusals]) table.moveNow = true
		if (state.snapshot) showTables()
	})
}

// ---- The connection

function show() {
	const { stats } = state.snapshot
	setText($("about"), `${stats.version}${stats.commit ? ` (${stats.commit})` : ""} · Caddy ${stats.caddy} · ${stats.go} · up ${span(age(stats.started))}` +
		(seconds(stats.loaded) - seconds(stats.started) > 2 ? ` · config ${span(age(stats.loaded))} old` : ""))
	const h = histogram("dial", RECENT)
	samples.at(-1).p50 = quantile(h, 0.5) ?? undefined
	showWarnings(stats.warnings, state.at)
	showTiles(stats)
	updateCharts()
	showTables()
	showSettings()
	document.title = `${short(mean("requests", 5))}/s · async_proxy`
}

let connected = false
function showState() {
	const name = !connected ? "reconnecting" : state.paused ? "paused" : "live"
	setAttribute($("state"), "data-state", name)
	setText($("state"), { live: "Live", paused: "Paused", reconnecting: state.snapshot ? "Reconnecting" : "Connecting" }[name])
}

let events = null
let lastHeard = 0
let retry = 0

function connect() {
	clearTimeout(retry)
	events?.close()
	lastHeard = performance.now()
	events = new EventSource("events")
	events.addEventListener("hello", (event) => {
		const hello = JSON.parse(event.data)
		if (hello.page !== document.querySelector("meta[name=version]").content) location.reload()
		state.canAct = hello.actions
		state.masked = hello.masked
		hour.begin()
	})
	events.addEventListener("history", (event) => hour.receive(JSON.parse(event.data)))
	events.addEventListener("snapshot", (event) => {
		lastHeard = performance.now()
		connected = true
		state.snapshot = JSON.parse(event.data)
		state.at = seconds(state.snapshot.stats.time)
		learn(state.snapshot)
		if (!state.paused) show()
		showState()
	})
	events.addEventListener("error", () => {
		connected = false
		showState()
		// The browser retries by itself, except when the response is not an event stream.
		if (events.readyState !== EventSource.CLOSED) return
		retry = setTimeout(connect, 3000)
		refused()
	})
}

// refused shows why the server denied the stream; EventSource hides the response.
async function refused() {
	try {
		const response = await fetch("events", { method: "HEAD" })
		if (!response.ok) note(response.status === 503 ? "Too many viewers; retrying." : `The server responded with status ${response.status}.`)
	} catch {
		// The server is unreachable.
	}
}

// A connection may also die silently.
setInterval(() => {
	if (!events || performance.now() - lastHeard < 4000) return
	connected = false
	showState()
	if (performance.now() - lastHeard > 10000) connect()
}, 1000)

$("pause").addEventListener("click", () => {
	state.paused = !state.paused
	setAttribute($("pause"), "aria-pressed", state.paused)
	showState()
	if (!state.paused && state.snapshot) show()
})

// A hidden page disconnects after five minutes, and then costs the server nothing.
const AWAY = 300 // seconds
let away
document.addEventListener("visibilitychange", () => {
	clearTimeout(away)
	if (document.hidden) {
		away = setTimeout(() => {
			events?.close()
			events = null
		}, AWAY * 1000)
	} else if (!events) {
		connect()
	}
})

connect()
