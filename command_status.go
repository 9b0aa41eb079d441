// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// refreshInterval is the refresh interval of --watch.
const refreshInterval = 2 * time.Second

// defaultRows is how many clients and tunnels the command shows when the terminal's height
// is unknown.
const defaultRows = 10

// statusCommand returns `caddy async-proxy status`.
func statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status [--refusals] [--sort <order>] [--limit <n>] [--client <text>] [--watch] [--json] [--address <addr>]",
		Short: "Shows what a running proxy is doing",
		Long: `
Queries the admin endpoint of a running Caddy and prints current warnings,
counters and the most recently active clients and tunnels. With --watch it
repeats every two seconds and keeps trying while Caddy cannot be reached. On a
terminal it then redraws in place and shows as many rows as fit.

--sort puts the largest or latest first. Clients can be sorted by
` + status.ClientSorts + `, and tunnels
by ` + status.TunnelSorts + `. A list that cannot be sorted in that way
keeps its usual order.

With --refusals it prints, in place of clients and tunnels, the refusals by
cause, client, target and rule, with what would allow them, and the targets
with the most requests. Refusals can be sorted by ` + status.RefusalSorts + `, and
targets by ` + status.TargetSorts + `.
`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().BoolP("watch", "w", false, "Repeat until interrupted")
	cmd.Flags().BoolP("refusals", "", false, "Show refusals and targets in place of clients and tunnels")
	cmd.Flags().BoolP("json", "j", false, "Print JSON; with --watch, one line per update")
	cmd.Flags().StringP("sort", "", "", "Sort by this, the largest or latest first")
	cmd.Flags().StringP("limit", "", "", fmt.Sprintf("Rows of each list, from 1 to %d (default %d, or more if they fit)", status.MaxPage, defaultRows))
	cmd.Flags().StringP("client", "", "", "Show only clients, and tunnels and refusals of clients, whose name contains this text")
	cmd.Flags().StringP("address", "", "", "Address of the admin endpoint, if it is not Caddy's default")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(runStatus)
	return cmd
}

// runStatus runs `caddy async-proxy status`.
func runStatus(flags caddycmd.Flags) (int, error) {
	address, err := adminAddress(flags.String("address"))
	if err != nil {
		return caddy.ExitCodeFailedQuit, err
	}
	query, err := statusQueryOf(flags)
	if err != nil {
		return caddy.ExitCodeFailedQuit, err
	}
	limit := query.limit
	watch, asJSON := flags.Bool("watch"), flags.Bool("json")
	stdout := int(os.Stdout.Fd())
	clear := watch && !asJSON && term.IsTerminal(stdout)
	for {
		width, height := 0, 0
		if clear {
			width, height, _ = term.GetSize(stdout) // 0 if unknown
		}
		query.limit = cmp.Or(limit, max(defaultRows, min(height, status.MaxPage)))
		shown, err := fetchStatus(address, query)
		if err != nil && !watch {
			return caddy.ExitCodeFailedQuit, err
		}
		var out bytes.Buffer
		switch {
		case err != nil && !clear:
			fmt.Fprintf(os.Stderr, "Error: %v\n", err)
		case err != nil:
			fmt.Fprintf(&out, "%s: no answer, retrying\n\n%s\n", time.Now().Format(time.TimeOnly), wrapText(err.Error(), width))
		case asJSON:
			_ = json.NewEncoder(&out).Encode(shown)
		default:
			shown.width = width
			if height > 0 {
				shown.fit(height)
			}
			shown.print(&out)
		}
		if clear {
			fmt.Print(screenUpdate(out.String(), width, height))
		} else {
			_, _ = out.WriteTo(os.Stdout)
		}
		if !watch {
			return caddy.ExitCodeSuccess, nil
		}
		time.Sleep(refreshInterval)
	}
}

// statusQueryOf returns what the flags ask for. Its limit is 0 if none is given.
func statusQueryOf(flags caddycmd.Flags) (statusQuery, error) {
	query := statusQuery{sort: flags.String("sort"), client: flags.String("client"), refusals: flags.Bool("refusals")}
	if query.refusals && flags.Changed("sort") {
		if err := checkRefusalSort(query.sort); err != nil {
			return query, err
		}
	} else if flags.Changed("sort") && !status.SortsClients(query.sort) && !status.SortsTunnels(query.sort) {
		return query, fmt.Errorf("--sort %q: expected %s for clients, or %s for tunnels", query.sort, status.ClientSorts, status.TunnelSorts)
	}
	if flags.Changed("limit") {
		var ok bool
		if query.limit, ok = parseInt(flags.String("limit"), 1, status.MaxPage); !ok {
			return query, fmt.Errorf("--limit %q: expected a number from 1 to %d", flags.String("limit"), status.MaxPage)
		}
	}
	return query, nil
}

// statusReport holds what the command prints.
type statusReport struct {
	Stats   status.Stats      `json:"stats"`
	Clients status.ClientList `json:"clients,omitzero"`
	Tunnels status.TunnelList `json:"tunnels,omitzero"`

	// With --refusals, in place of clients and tunnels.
	Refusals *status.RefusalList `json:"refusals,omitempty"`
	Targets  *status.TargetList  `json:"targets,omitempty"`

	width int // of the terminal; 0: unknown
}

// statusQuery selects the clients and tunnels that the command shows.
type statusQuery struct {
	sort, client string // "": the usual order, and all clients
	limit        int
	refusals     bool
}

// clients returns the query for the list of clients.
func (q statusQuery) clients() string {
	values := url.Values{"limit": {strconv.Itoa(q.limit)}, "q": {q.client}}
	if status.SortsClients(q.sort) {
		values.Set("sort", q.sort)
	}
	return values.Encode()
}

// tunnels returns the query for the list of tunnels. Those that were active last are first,
// if there is no other order.
func (q statusQuery) tunnels() string {
	values := url.Values{"limit": {strconv.Itoa(q.limit)}, "client": {q.client}, "sort": {"idle"}, "order": {"asc"}}
	if status.SortsTunnels(q.sort) {
		values.Set("sort", q.sort)
		values.Set("order", "desc")
	}
	return values.Encode()
}

func fetchStatus(address string, query statusQuery) (*statusReport, error) {
	var running status.Listeners
	if err := fetchAdmin(address, "listeners", &running); err != nil {
		return nil, err
	}
	if len(running.Listeners) == 0 {
		return nil, errNoProxy
	}
	s := new(statusReport)
	paths := map[string]any{"stats": &s.Stats, "clients?" + query.clients(): &s.Clients, "tunnels?" + query.tunnels(): &s.Tunnels}
	if query.refusals {
		paths = query.refusalPaths(s)
	}
	for path, into := range paths {
		if err := fetchAdmin(address, path, into); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// errNoProxy reports that Caddy runs without a proxy.
var errNoProxy = errors.New("no async_proxy is running")

// adminAddress returns the address of the admin endpoint: the one that --address gives, or Caddy's
// default.
func adminAddress(given string) (string, error) {
	if given != "" {
		if err := checkEndpoint("--address", given); err != nil {
			return "", err
		}
	} else if configured := os.Getenv("CADDY_ADMIN"); configured != "" {
		if err := checkEndpoint("CADDY_ADMIN", configured); err != nil {
			return "", err
		}
	}
	return caddycmd.DetermineAdminAPIAddress(cmp.Or(given, defaultAdmin()), nil, "", "")
}

// fetchAdmin reads what the admin API has below /async_proxy/ at path.
func fetchAdmin(address, path string, into any) error {
	res, err := caddycmd.AdminAPIRequest(address, http.MethodGet, "/async_proxy/"+path, nil, nil)
	if err != nil {
		return queryError(address, err)
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(into); err != nil {
		return fmt.Errorf("invalid response from %s: %w", address, err)
	}
	return nil
}

// queryError says why a query failed, and what to do about it. Caddy gives its reason as text only.
func queryError(address string, err error) error {
	text := err.Error()
	hint := "use --address for another admin endpoint"
	switch {
	case strings.Contains(text, "HTTP 400: "):
		var answer caddy.APIError
		_, body, _ := strings.Cut(text, "HTTP 400: ")
		if json.Unmarshal([]byte(body), &answer) == nil && answer.Message != "" {
			return errors.New(answer.Message)
		}
	case strings.Contains(text, "permission denied"):
		hint = "only root and the user that the proxy runs as may ask it"
	case strings.Contains(text, "connection refused"), strings.Contains(text, "no such file"):
		hint = "start the proxy, or " + hint
	}
	return fmt.Errorf("querying %s: %w; %s", address, err, hint)
}
