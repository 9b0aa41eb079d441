// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The strip of what is wrong now. It is empty while nothing is. Screen readers announce what is
// added to it, so elements stay as long as what they say.

import { $, make, setText } from "./base.js"

const HOLD = 5 // seconds for which a warning stays, so that one at its threshold does not flicker

const shown = new Map() // by code and site: the element, and when the server has last named it

// showWarnings shows warnings that the server has named at a time in seconds.
export function showWarnings(list, at) {
	for (const { code, site, text } of list) {
		const key = `${code} ${site ?? ""} ${code === "other_process" ? text : ""}`
		let entry = shown.get(key)
		if (!entry) {
			entry = { text: make("span"), root: make("p", { class: "warning", "data-code": code }) }
			if (site) entry.root.append(make("strong", {}, site), " ")
			entry.root.append(entry.text)
			shown.set(key, entry)
		}
		setText(entry.text, text)
		entry.at = at
		if (!entry.root.isConnected) $("warnings").append(entry.root)
	}
	for (const [key, entry] of shown) {
		if (entry.at > at - HOLD && entry.at <= at) continue
		entry.root.remove()
		shown.delete(key)
	}
}

// isWrong reports whether a warning with the code is shown.
export const isWrong = (code) => [...shown.keys()].some((key) => key.startsWith(`${code} `))
