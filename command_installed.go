// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"os"
	"strings"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
)

// installedName is the name of the program in releases, because `caddy` may be another package. The
// linker sets caddy.CustomBinaryName to it.
const installedName = "async-proxy"

// serviceSocket is the admin endpoint of the service that packages install.
const serviceSocket = "/run/async-proxy/admin.sock"

// init makes `async-proxy status` mean the same as `async-proxy async-proxy status` where the program
// is installed as async-proxy.
func init() {
	if caddy.CustomBinaryName != installedName {
		return
	}
	for _, cmd := range []*cobra.Command{statusCommand(), explainCommand(), checkCommand()} {
		caddycmd.RegisterCommand(caddycmd.Command{
			Name: cmd.Name(), Short: cmd.Short,
			CobraFunc: func(registered *cobra.Command) { *registered = *cmd },
		})
	}
}

// inOwnName returns a help text with the name that the program has.
func inOwnName(text string) string {
	if caddy.CustomBinaryName == "" {
		return text
	}
	return strings.ReplaceAll(text, "caddy ", caddy.CustomBinaryName+" ")
}

// defaultAdmin returns the address of the admin endpoint to ask if none is given: the installed
// service's while it runs, or an empty one, which stands for Caddy's default.
func defaultAdmin() string {
	_, changed := os.LookupEnv("CADDY_ADMIN")
	if _, err := os.Stat(serviceSocket); err != nil || changed || caddy.CustomBinaryName != installedName {
		return ""
	}
	return "unix/" + serviceSocket
}
