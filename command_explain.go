// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// exitUnknown is the exit status of `caddy async-proxy explain` if there is no decision. 0 means
// allowed, and 1, the status of errors without one of their own, means denied.
const exitUnknown = 2

// explainCommand returns `caddy async-proxy explain`.
func explainCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain --client <ip> [--user <name>] [--method <name>] [--json] [--config <file> [--adapter <name>] | --address <addr>] <target>",
		Short: "Says whether a request would be allowed, and why",
		Long: `
Says how async_proxy would treat a request: which policy applies, whether it
requires credentials, which rules decide about the destination's name and
addresses, how much of the client's limits is left, and whether the connection
would go through a parent proxy. The target is host:port for CONNECT, or a URL
for other methods.

Without --config it asks the running Caddy through its admin endpoint. With
--config it loads a configuration file without starting it. All limits are then
unused, and no address counts as one of the proxy's own listeners. Names are
resolved on the machine that answers. Nothing connects to the target.

The answer has a block for each async_proxy, named by the addresses of its site.
Matchers and handlers before async_proxy are not evaluated.

The exit status is 0 if each site allows the request, 1 if one denies it, and 2
if the target's name cannot be resolved or anything else fails.
`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return nil
			}
			return exitWith(cmd, exitUnknown, fmt.Errorf("%d targets; expected one, as host:port or a URL", len(args)))
		},
		RunE: runExplain,
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return exitWith(cmd, exitUnknown, suggestFlag(cmd, err)) })
	cmd.Flags().StringP("config", "c", "", "Configuration file; default: the running config")
	cmd.Flags().StringP("adapter", "a", "", "Name of the config adapter for the file")
	cmd.Flags().StringP("client", "", "", "IP address of the client")
	cmd.Flags().StringP("user", "u", "", "User name of the client (default none: no credentials)")
	cmd.Flags().StringP("method", "m", "", "Method (default CONNECT for host:port, GET for a URL)")
	cmd.Flags().BoolP("json", "j", false, "Print JSON")
	cmd.Flags().StringP("address", "", "", "Address of the admin endpoint, if it is not Caddy's default")
	return cmd
}

// exitWith logs err, if it is not nil, and returns the error that ends the process with a status
// above 1.
func exitWith(cmd *cobra.Command, code int, err error) error {
	cmd.SilenceErrors = true
	return caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) { return code, err })(cmd, nil)
}

// runExplain runs `caddy async-proxy explain`.
func runExplain(cmd *cobra.Command, args []string) error {
	flags := caddycmd.Flags{FlagSet: cmd.Flags()}
	answer, err := askExplain(flags, args[0])
	if err != nil {
		return exitWith(cmd, exitUnknown, err)
	}
	if flags.Bool("json") {
		err = json.NewEncoder(os.Stdout).Encode(answer)
	} else {
		for i := range answer.Sites {
			printExplanation(os.Stdout, &answer.Sites[i])
		}
	}
	decided := func(d status.Outcome) bool {
		return slices.ContainsFunc(answer.Sites, func(e status.Explanation) bool { return e.Decision == d })
	}
	switch {
	case err != nil:
		return exitWith(cmd, exitUnknown, err)
	case decided(status.Denied):
		cmd.SilenceErrors = true
		return errors.New("denied")
	case decided(status.Unresolved):
		return exitWith(cmd, exitUnknown, nil)
	}
	return nil
}

// askExplain returns the answer to the question that the flags ask about a target.
func askExplain(flags caddycmd.Flags, target string) (answer status.Explanations, err error) {
	given := url.Values{"target": {target}}
	for _, name := range []string{"client", "user", "method"} {
		given.Set(name, flags.String(name))
	}
	q, err := status.ReadQuestion(given)
	if err != nil {
		return answer, asFlag(err)
	}
	config, address := flags.String("config"), flags.String("address")
	switch {
	case config != "" && address != "":
		return answer, errors.New("--address: cannot be combined with --config, which asks no admin endpoint")
	case config != "":
		answer.Sites, err = explainFile(config, flags.String("adapter"), q)
		return answer, err
	case flags.String("adapter") != "":
		return answer, errors.New("--adapter: expected --config as well")
	}
	if address, err = adminAddress(address); err != nil {
		return answer, err
	}
	err = fetchAdmin(address, "explain?"+q.Values().Encode(), &answer)
	return answer, err
}

// asFlag names the parameter of the admin API in err as the command does. target is not a flag.
func asFlag(err error) error {
	if strings.HasPrefix(err.Error(), "client") {
		return fmt.Errorf("--%w", err)
	}
	return err
}

// explainFile answers a question about a configuration file. The process must end afterwards:
// Caddy offers no way to release a config that it has provisioned but not started.
func explainFile(file, adapter string, q status.Question) ([]status.Explanation, error) {
	text, _, _, err := caddycmd.LoadConfig(file, adapter)
	if err != nil {
		return nil, err
	}
	config := new(caddy.Config)
	if err := caddy.StrictUnmarshalJSON(caddy.RemoveMetaFields(text), config); err != nil {
		return nil, fmt.Errorf("decoding %s: %w", file, err)
	}
	// Loading would open the files of the config's logs, and create those that are missing. What goes wrong
	// still reaches standard error.
	config.Logging = &caddy.Logging{Logs: map[string]*caddy.CustomLog{"default": {BaseLog: caddy.BaseLog{Level: "WARN"}}}}
	if _, err := caddy.ProvisionContext(config); err != nil {
		return nil, err
	}
	sites, err := explainSites(context.Background(), q, false)
	if err == nil && len(sites) == 0 {
		err = fmt.Errorf("%s has no async_proxy", file)
	}
	return sites, err
}

// printExplanation prints an explanation in a few lines.
func printExplanation(w io.Writer, e *status.Explanation) {
	from := e.Client
	if e.User != "" {
		from = e.User + "@" + from
	}
	fmt.Fprintf(w, "%s: %s %s from %s: %s\n", printable.Text(e.Site), printable.Text(e.Method), printable.Text(e.Target), printable.Text(from), e.Decision)
	var lines bytes.Buffer
	table := tabwriter.NewWriter(&lines, 0, 0, 2, ' ', 0)
	row := func(what string, outcome status.Outcome, texts ...string) {
		texts = slices.DeleteFunc(texts, func(text string) bool { return text == "" })
		for i, text := range texts { // one by one: a long list of ranges must not hide what follows
			texts[i] = printable.Text(text)
		}
		fmt.Fprintf(table, "  %s\t%s\t%s\n", printable.Text(what), outcome, strings.Join(texts, "; "))
	}
	row("policy", status.Outcome(cmp.Or(e.Policy, "none")), cmp.Or(strings.Join(e.Conditions, "; "), "the directive's own options"))
	for _, c := range e.Checks {
		hint := ""
		if c.Outcome != status.Allowed && c.Hint != "" {
			hint = "to allow it: " + c.Hint
		}
		row(cmp.Or(c.Address, c.Check), c.Outcome, c.Rule, c.Detail, hint)
	}
	row("route", status.Outcome(cmp.Or(e.Parent, "direct")))
	_ = table.Flush()
	for line := range strings.Lines(lines.String()) {
		fmt.Fprintln(w, strings.TrimRight(line, " \n"))
	}
	for _, note := range e.Notes {
		fmt.Fprintf(w, "  note: %s\n", printable.Text(note))
	}
}
