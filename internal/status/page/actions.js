// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// What operators can do to clients and tunnels.

import { $, note, setText } from "./base.js"

export async function act(action, fields, done) {
	try {
		const response = await fetch(action, { method: "POST", body: new URLSearchParams(fields) })
		if (!response.ok) throw new Error((await response.json()).error)
		note(done)
	} catch (error) {
		note(String(error.message ?? error))
	}
}

export const unblock = (c) => act("block", { client: c.client, for: "0s" }, `${c.client} is no longer blocked.`)

// block asks for how long to block a client.
export function block(c) {
	setText($("block-client"), c.client)
	$("block").returnValue = ""
	$("block").onclose = () => {
		const duration = $("block-for")
		if ($("block").returnValue === "block") {
			act("block", { client: c.client, for: duration.value }, `${c.client} is blocked for ${duration.selectedOptions[0].text}.`)
		}
	}
	$("block").showModal()
}
