// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Command forwardproxy is Caddy with the module forwardproxy. The tests compare its answers with
// those of async_proxy. It is a module of its own, because nothing else needs that module.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	_ "github.com/caddyserver/forwardproxy"
)

func main() { caddycmd.Main() }
