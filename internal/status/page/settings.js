// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The settings of each site, with those of its policies.

import { $, make } from "./base.js"
import { state } from "./state.js"

let settingsShown = "" // as JSON

export function showSettings() {
	const { settings } = state.snapshot
	const now = JSON.stringify(settings)
	if (now === settingsShown) return
	settingsShown = now
	if (!settings.length) {
		$("sites").replaceChildren(make("p", { class: "hint" }, "This config has no async_proxy."))
		return
	}
	$("sites").replaceChildren(...settings.map(({ site, settings, policies = [] }) => {
		const parts = policies.flatMap(({ policy, settings }) => [make("h4", {}, `policy ${policy}`), settingsList(settings)])
		return make("div", { class: "site" }, make("h3", {}, site), settingsList(settings), ...parts)
	}))
}

function settingsList(settings) {
	const list = make("dl")
	for (const { option, value, default: isDefault } of settings) {
		const dd = make("dd", {}, value)
		if (isDefault) dd.append(make("span", { class: "hidden" }, " (default)"))
		list.append(make("div", isDefault ? { class: "default" } : {}, make("dt", {}, option), dd))
	}
	return list
}
