// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "async-proxy",
		Usage: "[--listen <addr>] [--status <addr> [--actions]] [--burst <n>] [--refill <n>] [--clients <cidr>] [--allow <destination>] [--deny <destination>] [--auth <user:hash>] [--upstream <url>] [--pac] [--admin <addr>] [--access-log[=<file>]] [--debug]",
		Short: "A forward proxy in one line",
		Long: `
Runs a forward proxy until it is stopped. Useful for development and quick
trials; for anything more, use the async_proxy directive in a Caddyfile.

By default it listens on this machine only, and its limit suits a browser: 200
requests at once, and 20 more per second. (The directive's default, 10 and 0.5,
suits scripts.) When it listens on other addresses, clients with private
addresses may use it unless --clients or --auth say otherwise; --clients all
opens it to everyone.

When it has started, it prints one line on stderr that says who may use it, and
how. --status localhost:9090 serves a page with its clients, tunnels and
refusals there; with --actions, the page can also close tunnels and block
clients. --pac serves a proxy auto-configuration script at /proxy.pac.
--access-log writes Caddy's access log to stderr, --access-log=<file> to a file.

--allow and --deny accept the same destinations as the directive. All --allow
flags apply before all --deny flags:

  caddy async-proxy --allow '*.example.com' --deny all

allows the hosts below example.com and nothing else. Create hashes for --auth
with caddy hash-password. --clients, --allow, --deny and --auth may be repeated.

caddy async-proxy status shows what a running proxy is doing. caddy async-proxy
explain says whether a request would be allowed, and why.
`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.Long = inOwnName(cmd.Long)
			flags := cmd.Flags()
			flags.StringP("listen", "l", "127.0.0.1:8080", "Address to listen on")
			flags.StringP("status", "s", "", "Address for a status page, such as localhost:9090")
			flags.BoolP("actions", "", false, "Let the status page close tunnels and block clients")
			flags.StringP("burst", "b", commandBurst, "Requests a client may make at once")
			flags.StringP("refill", "r", commandRefill, "Requests per second a client regains")
			flags.StringArrayP("clients", "c", nil, "Clients that may use the proxy, as CIDR ranges, or all (default private_ranges)")
			flags.StringArrayP("allow", "a", nil, "Allow a destination")
			flags.StringArrayP("deny", "d", nil, "Deny a destination")
			flags.StringArrayP("auth", "", nil, "User and password hash, as user:hash")
			flags.StringP("upstream", "u", "", "Parent proxy, as an http://, https:// or socks5:// URL")
			flags.StringP("admin", "", "localhost:2019", "Address of the admin endpoint, or off")
			flags.BoolP("pac", "", false, "Serve a proxy auto-configuration script at /proxy.pac")
			flags.StringP("access-log", "", "", "Write the access log, to stderr or to a file")
			flags.Lookup("access-log").NoOptDefVal = accessToStderr
			flags.BoolP("debug", "v", false, "Enable verbose debug logs")
			cmd.SetFlagErrorFunc(suggestFlag)
			cmd.Args, cmd.SuggestionsMinimumDistance = noArguments, 2
			cmd.RunE = caddycmd.WrapCommandFuncForCobra(runCommand)
			cmd.AddCommand(statusCommand(), explainCommand(), checkCommand())
		},
	})
}

// The limit of `caddy async-proxy` suits a browser, which opens a dozen tunnels for one page.
const (
	commandBurst  = "200"
	commandRefill = "20"
)

// accessToStderr is the value of --access-log without a file.
const accessToStderr = "stderr"

// suggestFlag adds the most similar flag to the error for an unknown one.
func suggestFlag(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) || unknown.GetSpecifiedShortnames() != "" {
		return err
	}
	name, nearest := unknown.GetSpecifiedName(), ""
	cmd.Flags().VisitAll(func(flag *pflag.Flag) {
		if nearest == "" || editDistance(name, flag.Name) < editDistance(name, nearest) {
			nearest = flag.Name
		}
	})
	if editDistance(name, nearest) > 2 {
		return err
	}
	return fmt.Errorf("%w; did you mean --%s?", err, nearest)
}

// noArguments rejects arguments that are neither flags nor subcommands.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if cmd.Flags().Lookup("access-log").Value.String() == accessToStderr && strings.ContainsAny(args[0], "./\\") {
		return fmt.Errorf("unexpected argument %q; expected --access-log=%[1]s", args[0])
	}
	if similar := cmd.SuggestionsFor(args[0]); len(similar) > 0 {
		return fmt.Errorf("unexpected argument %q; did you mean %s %s?", args[0], cmd.CommandPath(), similar[0])
	}
	if cmd.Flags().NFlag() == 0 {
		return fmt.Errorf("unexpected argument %q; expected flags, or one of the commands check, explain and status", args[0])
	}
	return fmt.Errorf("unexpected argument %q; a flag has two dashes, takes one value and may be repeated", args[0])
}

// runCommand implements `caddy async-proxy`.
func runCommand(flags caddycmd.Flags) (int, error) {
	caddy.TrapSignals()
	config, err := commandConfig(flags)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	if err := checkFree(flags); err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	if err := caddy.Run(config); err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	if p := currentProcess(); p != nil {
		for each := range p.proxies.All() {
			fmt.Fprintln(os.Stderr, each.introduction())
		}
	}
	select {}
}

// checkFree fails if another process listens on an address of the flags, or if two of them are the same. Caddy
// itself would share the address silently, and connections would reach either listener.
func checkFree(flags caddycmd.Flags) error {
	names := []string{"listen", "admin", "status"}
	for i, name := range names {
		address := flags.String(name)
		err := checkUnused(address)
		if err != nil {
			return fmt.Errorf("%w; stop the process that listens there, or choose another address with --%s", err, name)
		}
		for _, other := range names[:i] {
			if checkUnused(flags.String(other), address) != nil {
				return fmt.Errorf("--%s %s and --%s %s have the same port; expected different ones", other, flags.String(other), name, address)
			}
		}
	}
	return nil
}

// checkUnused returns an error if addresses cannot be listened at all at once. Caddy reports invalid ones itself.
func checkUnused(addresses ...string) error {
	for _, address := range addresses {
		addr, err := caddy.ParseNetworkAddress(address)
		if err != nil || address == "" || address == "off" || addr.IsUnixNetwork() || addr.IsFdNetwork() {
			continue
		}
		for i := range addr.PortRangeSize() {
			ln, err := net.Listen(addr.Network, addr.JoinHostPort(i))
			if errors.Is(err, syscall.EADDRINUSE) {
				return err
			}
			if err == nil {
				defer ln.Close()
			}
		}
	}
	return nil
}

// checkEndpoint rejects flag values that are not listen addresses: those without a port,
// and URLs.
func checkEndpoint(flag, address string) error {
	addr, err := caddy.ParseNetworkAddress(address)
	if err != nil || strings.Contains(address, "://") || addr.StartPort == 0 && !addr.IsUnixNetwork() && !addr.IsFdNetwork() {
		return fmt.Errorf("%s %q: expected an address with a port, such as 127.0.0.1:8080 or :8080", flag, address)
	}
	return nil
}

// commandHandler builds the handler that the flags describe. It checks them like the
// directive's options.
func commandHandler(flags caddycmd.Flags) (*Handler, error) {
	h := new(Handler)
	for _, name := range []string{"burst", "refill"} {
		if err := setOption(h, name, flags.String(name)); err != nil {
			return nil, fmt.Errorf("--%w", err)
		}
	}
	if flags.Bool("pac") {
		h.ServePAC = defaultPACPath
	}
	clients, err := flags.GetStringArray("clients")
	if err != nil {
		return nil, err
	}
	for _, value := range clients {
		if err := setOption(h, "clients", value); err != nil {
			return nil, fmt.Errorf("--%w", err)
		}
	}
	for _, action := range []string{"allow", "deny"} {
		destinations, err := flags.GetStringArray(action)
		if err != nil {
			return nil, err
		}
		if len(destinations) == 0 {
			continue
		}
		rule := Rule{Action: action, Destinations: destinations}
		if err := rule.check(); err != nil {
			return nil, fmt.Errorf("--%w", err)
		}
		h.Rules = append(h.Rules, rule)
	}
	if err := h.checkTogether(); err != nil {
		return nil, err
	}
	u, err := uselessRule(h, nil)
	if u != nil {
		return nil, fmt.Errorf("--allow: %s", u.Text())
	}
	return h, err
}

// setOption stores the value of a flag that is named like an option.
func setOption(h *Handler, name, value string) error {
	o, _ := optionNamed(name)
	if !o.set(h, value) {
		return invalidValue(name, o.expected, value)
	}
	return nil
}

// commandAuth returns the providers for the accounts in the flags; none if there are none.
func commandAuth(flags caddycmd.Flags) (caddy.ModuleMap, error) {
	accounts, err := flags.GetStringArray("auth")
	if err != nil || len(accounts) == 0 {
		return nil, err
	}
	auth := caddyauth.HTTPBasicAuth{HashCache: new(caddyauth.Cache)}
	for _, account := range accounts {
		user, hash, found := strings.Cut(account, ":")
		algorithm := "bcrypt"
		if strings.HasPrefix(hash, "$argon2id$") {
			algorithm = "argon2id"
		}
		if isPublished(hash) {
			return nil, fmt.Errorf("--auth: the user %q has %w", user, errPublished)
		}
		if !found || checkUserName(user) != nil || checkHash(algorithm, hash) != nil {
			return nil, errors.New("--auth: expected user:hash, with a hash as `caddy hash-password` prints it")
		}
		if raw := json.RawMessage(`{"algorithm":"` + algorithm + `"}`); auth.HashRaw == nil {
			auth.HashRaw = raw
		} else if string(auth.HashRaw) != string(raw) {
			return nil, errors.New("--auth: expected all hashes to use the same algorithm")
		}
		auth.AccountList = append(auth.AccountList, caddyauth.Account{Username: user, Password: hash})
	}
	return caddy.ModuleMap{"http_basic": caddyconfig.JSON(auth, nil)}, nil
}

// commandConfig builds the config that the flags describe.
func commandConfig(flags caddycmd.Flags) (*caddy.Config, error) {
	h, err := commandHandler(flags)
	if err != nil {
		return nil, err
	}
	if h.AuthRaw, err = commandAuth(flags); err != nil {
		return nil, err
	}
	if url := flags.String("upstream"); url != "" {
		if _, _, _, err := splitUpstream(url); err != nil {
			return nil, fmt.Errorf("--upstream: %w", err)
		}
		h.Upstream = &Upstream{URL: url}
	}
	servers, err := commandServers(flags, h)
	if err != nil {
		return nil, err
	}
	if admin := flags.String("admin"); admin != "off" && admin != "" && !strings.Contains(admin, "{") { // Caddy replaces placeholders
		if err := checkEndpoint("--admin", admin); err != nil {
			return nil, err
		}
	}
	persist := false
	config := &caddy.Config{
		Logging: commandLogging(flags),
		Admin:   &caddy.AdminConfig{Listen: flags.String("admin"), Config: &caddy.ConfigSettings{Persist: &persist}},
		AppsRaw: caddy.ModuleMap{
			"http": caddyconfig.JSON(caddyhttp.App{Servers: servers}, nil),
		},
	}
	if flags.String("admin") == "off" {
		config.Admin = &caddy.AdminConfig{Disabled: true, Config: config.Admin.Config}
	}
	return config, nil
}
