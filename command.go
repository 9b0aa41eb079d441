// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "async-proxy",
		Usage: "[--listen <addr>] [--burst <n>] [--refill <n>] [--clients <cidr>] [--allow <destination>] [--deny <destination>] [--auth <user:hash>] [--upstream <url>] [--admin <addr>] [--access-log] [--debug]",
		Short: "A forward proxy in one line",
		Long: `
Runs a forward proxy until it is stopped. Useful for development and for a quick
look; for more, use the async_proxy directive in a Caddyfile.

By default it listens on this machine only. Before you have it listen on more,
let in only whom you know, by --clients or --auth. What --allow and --deny name
is as in the directive; all that is allowed goes before all that is denied, so
that

  caddy async-proxy --allow '*.example.com' --deny all

lets clients go to example.com's hosts and nowhere else. Hashes for --auth are
made by caddy hash-password. These three and --clients may be repeated.

caddy async-proxy status shows what a proxy is doing.
`,
		CobraFunc: func(cmd *cobra.Command) {
			flags := cmd.Flags()
			flags.StringP("listen", "l", "127.0.0.1:8080", "Address to listen on")
			flags.IntP("burst", "b", 0, "Requests that a client may make at once (default 10)")
			flags.Float64P("refill", "r", 0, "Requests a second that it gains (default 0.5)")
			flags.StringArrayP("clients", "c", nil, "The only clients that may use the proxy, as CIDR ranges")
			flags.StringArrayP("allow", "a", nil, "Destinations that are open")
			flags.StringArrayP("deny", "d", nil, "Destinations that are closed")
			flags.StringArrayP("auth", "", nil, "A user and a hash, user:hash")
			flags.StringP("upstream", "u", "", "A parent proxy, http://, https:// or socks5://")
			flags.StringP("admin", "", "localhost:2019", "Address of the admin endpoint, which the status is asked from; or off")
			flags.BoolP("access-log", "", false, "Enable the access log")
			flags.BoolP("debug", "v", false, "Enable verbose debug logs")
			cmd.RunE = caddycmd.WrapCommandFuncForCobra(runCommand)
			cmd.AddCommand(statusCommand())
		},
	})
}

// runCommand is `caddy async-proxy`.
func runCommand(flags caddycmd.Flags) (int, error) {
	caddy.TrapSignals()
	config, err := commandConfig(flags)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	if err := caddy.Run(config); err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	select {}
}

// commandConfig makes the config that the flags describe.
func commandConfig(flags caddycmd.Flags) (*caddy.Config, error) {
	h := Handler{Burst: int64(flags.Int("burst")), Refill: flags.Float64("refill")}
	var lists [4][]string
	for i, name := range []string{"clients", "allow", "deny", "auth"} {
		var err error
		if lists[i], err = flags.GetStringArray(name); err != nil {
			return nil, err
		}
	}
	h.Clients = lists[0]
	for i, action := range []string{"allow", "deny"} {
		if destinations := lists[1+i]; len(destinations) > 0 {
			h.Rules = append(h.Rules, Rule{Action: action, Destinations: destinations})
		}
	}
	if len(lists[3]) > 0 {
		auth := caddyauth.HTTPBasicAuth{HashCache: new(caddyauth.Cache)}
		for _, account := range lists[3] {
			user, hash, found := strings.Cut(account, ":")
			if !found || user == "" || !strings.HasPrefix(hash, "$") {
				return nil, errors.New("auth: expected user:hash, with a hash as `caddy hash-password` makes it")
			}
			algorithm := "bcrypt"
			if strings.HasPrefix(hash, "$argon2id$") {
				algorithm = "argon2id"
			}
			if raw := json.RawMessage(`{"algorithm":"` + algorithm + `"}`); auth.HashRaw == nil {
				auth.HashRaw = raw
			} else if string(auth.HashRaw) != string(raw) {
				return nil, errors.New("auth: expected hashes of one kind")
			}
			auth.AccountList = append(auth.AccountList, caddyauth.Account{Username: user, Password: hash})
		}
		h.AuthRaw = caddy.ModuleMap{"http_basic": caddyconfig.JSON(auth, nil)}
	}
	if url := flags.String("upstream"); url != "" {
		h.Upstream = &Upstream{URL: url}
	}
	listen := flags.String("listen")
	if _, err := caddy.ParseNetworkAddress(listen); err != nil {
		return nil, fmt.Errorf("listen %q: expected an address such as 127.0.0.1:8080", listen)
	}
	server := &caddyhttp.Server{
		Listen:    []string{listen},
		AutoHTTPS: &caddyhttp.AutoHTTPSConfig{Disabled: true},
		Routes:    caddyhttp.RouteList{{HandlersRaw: []json.RawMessage{caddyconfig.JSONModuleObject(h, "handler", "async_proxy", nil)}}},
	}
	if flags.Bool("access-log") {
		server.Logs = new(caddyhttp.ServerLogConfig)
	}
	persist := false
	config := &caddy.Config{
		Admin: &caddy.AdminConfig{Listen: flags.String("admin"), Config: &caddy.ConfigSettings{Persist: &persist}},
		AppsRaw: caddy.ModuleMap{
			"http": caddyconfig.JSON(caddyhttp.App{Servers: map[string]*caddyhttp.Server{"proxy": server}}, nil),
		},
	}
	if flags.String("admin") == "off" {
		config.Admin = &caddy.AdminConfig{Disabled: true, Config: config.Admin.Config}
	}
	if flags.Bool("debug") {
		config.Logging = &caddy.Logging{Logs: map[string]*caddy.CustomLog{
			"default": {BaseLog: caddy.BaseLog{Level: zap.DebugLevel.CapitalString()}},
		}}
	}
	return config, nil
}
